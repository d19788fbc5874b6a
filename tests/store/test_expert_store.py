"""Experts come out of real files as they went in, wherever and however they are stored."""

# E experts

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stores import cut_short, number, numbered_store, put_back
from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import LayerSource, ScatteredExpert
from transformers_moe_offload.tensor_files.index import read_index

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random_tensor(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def index_of(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return read_index([folder / "model.safetensors"])


def store_of_one_field(sources, shape, dtype):
    """A layer whose experts have one tensor each, from one source each."""
    spec = ExpertSpec(0, "experts", len(sources), (FieldSpec("w", tuple(shape), dtype_name(dtype)),))
    return ExpertStore([LayerSource(spec, tuple(ScatteredExpert((source,)) for source in sources))])


def read(store, expert, layer=0):
    layout = store.layout(layer, 0)
    record = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    store.read_into(ExpertId(layer, expert), record)
    return layout.views(record)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_expert_of_a_stacked_tensor_is_read_verbatim(tmp_path, dtype):
    stacked = random_tensor((4, 3, 5), dtype)
    index = index_of(tmp_path, {"before": torch.ones(7), "w": stacked})
    sources = [FieldSource((index["w"].row(e, 4),), (dtype_name(dtype),)) for e in range(4)]
    assert all(source.is_verbatim for source in sources)
    store = store_of_one_field(sources, (3, 5), dtype)
    for e in range(4):
        assert torch.equal(read(store, e)["w"], stacked[e])


def test_bits_that_are_no_number_are_read_as_they_are(tmp_path):
    raw = torch.tensor([0x7FC1, 0xFFFF, 0x7F81, 0x8000, 0x0001], dtype=torch.int32).to(torch.uint16)
    index = index_of(tmp_path, {"w": raw.view(torch.bfloat16).unsqueeze(0)})
    store = store_of_one_field([FieldSource((index["w"],), ("bfloat16",))], (5,), torch.bfloat16)
    assert torch.equal(read(store, 0)["w"].view(torch.uint16), raw)


def test_pieces_follow_one_another_in_the_record(tmp_path):
    gate, up = random_tensor((3, 5), torch.float32, 1), random_tensor((3, 5), torch.float32, 2)
    index = index_of(tmp_path, {"up": up, "gate": gate})
    source = FieldSource((index["gate"], index["up"]), ("float32",))
    assert source.is_verbatim
    store = store_of_one_field([source], (6, 5), torch.float32)
    assert torch.equal(read(store, 0)["w"], torch.cat([gate, up]))


def test_pieces_of_several_files_make_one_expert(tmp_path):
    gate, up = random_tensor((3, 5), torch.float32, 1), random_tensor((3, 5), torch.float32, 2)
    save_file({"gate": gate}, tmp_path / "1.safetensors")
    save_file({"up": up}, tmp_path / "2.safetensors")
    index = read_index([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    store = store_of_one_field([FieldSource((index["gate"], index["up"]), ("float32",))], (6, 5), torch.float32)
    assert torch.equal(read(store, 0)["w"], torch.cat([gate, up]))


def test_pieces_in_another_dtype_are_cast_and_then_joined(tmp_path):
    gate, up = random_tensor((3, 5), torch.float32, 1), random_tensor((3, 5), torch.float16, 2)
    index = index_of(tmp_path, {"up": up, "gate": gate})
    source = FieldSource((index["gate"], index["up"]), ("bfloat16",))
    assert not source.is_verbatim
    store = store_of_one_field([source], (6, 5), torch.bfloat16)
    assert torch.equal(read(store, 0)["w"], torch.cat([gate.bfloat16(), up.bfloat16()]))


def test_an_assembled_field_is_made_from_its_pieces_in_their_order(tmp_path):
    gate, up = random_tensor((3, 5), torch.float32, 1), random_tensor((3, 5), torch.float32, 2)
    index = index_of(tmp_path, {"up": up, "gate": gate})
    source = FieldSource(
        (index["gate"], index["up"]), ("float32",), lambda pieces: torch.stack(pieces, dim=-1).flatten(-2).T
    )
    assert not source.is_verbatim, "the bytes do not lie in the file as they should lie in memory"
    store = store_of_one_field([source], (10, 3), torch.float32)
    got = read(store, 0)["w"]
    assert torch.equal(got[0::2], gate.T)
    assert torch.equal(got[1::2], up.T)


def test_an_assembled_field_may_keep_leading_dimensions_of_one(tmp_path):
    stacked = random_tensor((2, 3, 5), torch.float32)
    index = index_of(tmp_path, {"w": stacked})
    sources = [FieldSource((index["w"].row(e, 2),), ("float32",), lambda p: p[0].transpose(-1, -2)) for e in range(2)]
    store = store_of_one_field(sources, (5, 3), torch.float32)
    assert torch.equal(read(store, 1)["w"], stacked[1].T)


def test_casts_are_done_one_after_another_and_none_is_skipped(tmp_path):
    """float32 -> bfloat16 -> float32 rounds, though the first and the last dtype are the same."""
    stored = random_tensor((64,), torch.float32)
    index = index_of(tmp_path, {"w": stored})
    source = FieldSource((index["w"],), ("float32",)).then_cast("bfloat16").then_cast("float32")
    assert not source.is_verbatim
    got = read(store_of_one_field([source], (64,), torch.float32), 0)["w"]
    assert torch.equal(got, stored.bfloat16().float())
    assert not torch.equal(got, stored)


def test_a_cast_to_the_dtype_it_has_changes_nothing_and_stays_verbatim(tmp_path):
    index = index_of(tmp_path, {"w": torch.ones(3)})
    source = FieldSource((index["w"],), ("float32",))
    assert source.then_cast("float32") is source


def test_a_layer_that_is_cast_says_so_in_its_spec_and_in_its_bytes(tmp_path):
    layer = numbered_store(tmp_path, 1, 4).layers[0].cast("float16")
    assert {field.dtype for field in layer.spec.fields} == {"float16"}
    weights = read(ExpertStore([layer]), 3)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert {value for tensor in weights.values() for value in tensor.flatten().tolist()} == {number(ExpertId(0, 3))}


def test_casting_a_layer_leaves_the_original_alone(tmp_path):
    layer = numbered_store(tmp_path, 1, 2).layers[0]
    layer.cast("float16")
    assert {field.name: field.dtype for field in layer.spec.fields} == {"bias": "bfloat16", "weight": "float32"}


def test_each_expert_of_each_layer_is_itself(tmp_path):
    store = numbered_store(tmp_path, 3, 5)
    for layer in range(3):
        for expert in range(5):
            values = {v for tensor in read(store, expert, layer).values() for v in tensor.flatten().tolist()}
            assert values == {number(ExpertId(layer, expert))}


def test_stored_bytes_are_those_in_the_file_and_not_those_in_the_record(tmp_path):
    index = index_of(tmp_path, {"w": torch.ones(10)})
    source = FieldSource((index["w"],), ("bfloat16",))
    assert store_of_one_field([source], (10,), torch.bfloat16).stored_bytes(ExpertId(0, 0)) == 40


def test_reading_stops_at_the_record_and_writes_no_padding_but_its_fields(tmp_path):
    store = numbered_store(tmp_path, 1, 2)
    layout = store.layout(0, 0)
    around = torch.full((layout.nbytes + 64,), 0xAA, dtype=torch.uint8)
    store.read_into(ExpertId(0, 1), around[: layout.nbytes])
    written = torch.zeros(len(around), dtype=torch.bool)
    for field in layout.fields:
        written[layout.offsets[field.name] : layout.offsets[field.name] + field.nbytes] = True
    assert (around[~written] == 0xAA).all()


@pytest.mark.parametrize("cast", [None, "float16"])
def test_a_file_cut_short_is_an_error_for_the_experts_it_has_lost(tmp_path, cast):
    store = numbered_store(tmp_path, 1, 8)
    if cast:
        store = ExpertStore([store.layers[0].cast(cast)])
    read(store, 0)
    path = tmp_path / "model.safetensors"
    with put_back(path) as whole:
        cut_short(path, len(whole) - 1)
        with pytest.raises(CheckpointError, match=f"{len(whole) - 1:,}"):
            read(store, 7)
    assert read(store, 7)["weight"].unique().tolist() == [8]


def test_a_copy_of_a_model_shares_the_store(tmp_path):
    store = numbered_store(tmp_path, 1, 1)
    assert deepcopy(store) is store


def test_reading_inside_inference_mode_leaves_a_record_that_can_be_used_outside_of_it(tmp_path):
    layer = numbered_store(tmp_path, 1, 2).layers[0].cast("float32")
    store = ExpertStore([layer])
    record = torch.zeros(store.layout(0, 0).nbytes, dtype=torch.uint8)
    with torch.inference_mode():
        store.read_into(ExpertId(0, 1), record)
    weight = store.layout(0, 0).views(record)["weight"].clone().requires_grad_()
    weight.sum().backward()
    assert weight.grad.eq(1).all()


@settings(max_examples=60, deadline=None)
@given(
    num_experts=st.integers(1, 4),
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3),
    stored=st.lists(st.sampled_from(FLOATS), min_size=3, max_size=3),
    casts=st.lists(st.sampled_from(FLOATS), max_size=2),
    seed=st.integers(0, 1000),
)
def test_any_checkpoint_written_by_safetensors_comes_out_as_it_went_in(
    tmp_path_factory, num_experts, shapes, stored, casts, seed
):
    tensors = {f"w{i}": random_tensor((num_experts, *shape), stored[i], seed + i) for i, shape in enumerate(shapes)}
    index = index_of(tmp_path_factory.mktemp("checkpoint"), tensors)
    fields, sources = [], [[] for _ in range(num_experts)]
    for i, shape in enumerate(shapes):
        name, dtype = f"w{i}", dtype_name(stored[i])
        fields.append(FieldSpec(name, tuple(shape), dtype))
        for expert in range(num_experts):
            sources[expert].append(FieldSource((index[name].row(expert, num_experts),), (dtype,)))
    layer = LayerSource(
        ExpertSpec(0, "experts", num_experts, tuple(fields)),
        tuple(ScatteredExpert(tuple(fields)) for fields in sources),
    )
    for dtype in casts:
        layer = layer.cast(dtype_name(dtype))
    store = ExpertStore([layer])
    for expert in range(num_experts):
        for name, got in read(store, expert).items():
            expected = tensors[name][expert]
            for dtype in casts:
                expected = expected.to(dtype)
            assert got.dtype == expected.dtype == torch_dtype(dtype_name(expected.dtype))
            assert got.shape == expected.shape
            assert torch.equal(bits(got), bits(expected))
