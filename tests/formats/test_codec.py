import pickle
from copy import deepcopy

import pytest
import torch

from formats.weights import relative_error
from transformers_moe_offload.config.formats import HqqFormat
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.codec import ExpertCodec, FieldCodec
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.kernels.packed import PackedMatrix
from transformers_moe_offload.kernels.reference import dequantize
from transformers_moe_offload.store.record import RecordLayout

FORMAT = HqqFormat(nbits=4, group_size=16)
FIELDS = (
    FieldSpec("gate_up_proj", (96, 32), "bfloat16"),
    FieldSpec("gate_up_proj_bias", (96,), "bfloat16"),
    FieldSpec("down_proj", (32, 48), "bfloat16"),
    FieldSpec("down_proj_bias", (32,), "bfloat16"),
)


def expert(fields=FIELDS):
    generator = torch.Generator().manual_seed(0)
    return {f.name: torch.randn(f.shape, generator=generator).to(getattr(torch, f.dtype)) for f in fields}


def described(parts):
    return [(name, tuple(part.shape), str(part.dtype).removeprefix("torch.")) for name, part in parts.items()]


@pytest.mark.parametrize("meta_nbits", [16, 8])
@pytest.mark.parametrize("nbits", [4, 3])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_an_expert_becomes_the_arrays_that_are_announced_in_their_order(is_transposed, nbits, meta_nbits):
    codec = ExpertCodec(FIELDS, HqqFormat(nbits=nbits, group_size=16, meta_nbits=meta_nbits), is_transposed)
    assert described(codec.encode(expert())) == [(part.name, part.shape, part.dtype) for part in codec.stored]


def test_arrays_are_named_after_field_and_part_and_dense_fields_keep_their_names():
    names = [part.name for part in ExpertCodec(FIELDS, FORMAT).stored]
    assert names == [
        *(f"gate_up_proj.{part}" for part in ("codes", "scale", "zero", "scale_range", "zero_range")),
        "gate_up_proj_bias",
        *(f"down_proj.{part}" for part in ("codes", "scale", "zero", "scale_range", "zero_range")),
        "down_proj_bias",
    ]


def test_only_matrices_are_quantized():
    fields = (
        FieldSpec("up_proj", (16, 32), "float32"),
        FieldSpec("odd_bias", (16, 32), "float32"),
        FieldSpec("post_norm", (16,), "float32"),
        FieldSpec("stacked", (2, 16, 32), "float32"),
    )
    codec = ExpertCodec(fields, FORMAT)
    assert [one.field.name for one in codec.codecs if one.format is not None] == ["up_proj"]
    tensors = expert(fields)
    decoded = codec.decode(codec.encode(tensors))
    assert all(torch.equal(decoded[name], tensors[name]) for name in ("odd_bias", "post_norm", "stacked"))


def test_a_matrix_is_quantized_as_it_would_be_alone_and_decoded_to_its_dtype():
    codec, tensors = ExpertCodec(FIELDS, FORMAT), expert()
    decoded = codec.decode(codec.encode(tensors))
    assert described(decoded) == described(tensors)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(decoded[name], dequantize(quantize(tensors[name], FORMAT), torch.bfloat16))


def test_matrices_that_are_transposed_in_the_module_have_their_groups_along_the_input_all_the_same():
    transposed = tuple(FieldSpec(f.name, tuple(reversed(f.shape)), f.dtype) if len(f.shape) == 2 else f for f in FIELDS)
    tensors = expert()
    turned = {name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    plain, codec = ExpertCodec(FIELDS, FORMAT), ExpertCodec(transposed, FORMAT, is_transposed=True)
    parts, expected = codec.encode(turned), plain.encode(tensors)
    assert described(parts) == described(expected)
    assert all(torch.equal(parts[name], expected[name]) for name in parts)
    decoded = codec.decode(parts)
    assert all(tensor.is_contiguous() for tensor in decoded.values())
    for name, tensor in plain.decode(expected).items():
        assert torch.equal(decoded[name], tensor.t() if tensor.dim() == 2 else tensor)


def test_what_is_computed_with_is_the_record_itself():
    codec = ExpertCodec(FIELDS, FORMAT)
    layout = RecordLayout(codec.stored)
    views = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    for name, part in codec.encode(expert()).items():
        views[name].copy_(part)
    weights = codec.matrices(views)
    assert list(weights) == [field.name for field in FIELDS]
    assert weights["down_proj_bias"] is views["down_proj_bias"]
    matrix = weights["down_proj"]
    assert isinstance(matrix, PackedMatrix)
    assert all(part is views[f"down_proj.{name}"] for name, part in matrix.parts.items())
    assert torch.equal(dequantize(matrix, torch.bfloat16), codec.decode(views)["down_proj"])


def test_for_a_model_in_another_dtype_what_is_stored_stays_and_is_decoded_to_that():
    codec, tensors = ExpertCodec(FIELDS, FORMAT), expert()
    cast = codec.cast("float32")
    assert cast.stored == codec.stored
    parts = cast.encode(tensors)
    assert all(torch.equal(part, parts[name]) for name, part in codec.encode(tensors).items())
    decoded = cast.decode(parts)
    assert {tensor.dtype for tensor in decoded.values()} == {torch.float32}
    assert cast.matrices(parts)["down_proj_bias"].dtype == torch.float32
    assert torch.equal(decoded["down_proj"].bfloat16(), codec.decode(parts)["down_proj"])


def test_a_layer_without_a_format_is_stored_as_it_is():
    codec, tensors = ExpertCodec(FIELDS, None), expert()
    assert codec.stored == FIELDS
    assert all(torch.equal(part, tensors[name]) for name, part in codec.encode(tensors).items())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in codec.decode(tensors).items())


def test_equal_codecs_are_one_key_and_survive_copies():
    codec = ExpertCodec(FIELDS, FORMAT, is_transposed=False)
    again = ExpertCodec(FIELDS, FORMAT)
    copied, pickled = deepcopy(codec), pickle.loads(pickle.dumps(codec))
    assert len({codec, again, copied, pickled}) == 1
    assert copied.stored == codec.stored
    assert len({codec, ExpertCodec(FIELDS, HqqFormat(nbits=3, group_size=16)), ExpertCodec(FIELDS, None)}) == 3


def test_a_group_size_that_fits_no_field_is_refused_at_once_and_the_field_named():
    with pytest.raises(ConfigError, match="group_size=32 does not divide the 48 inputs of down_proj, 32 x 48"):
        ExpertCodec(FIELDS, HqqFormat(group_size=32))
    with pytest.raises(ConfigError, match="group_size=64 does not divide the 96 inputs of gate_up_proj, 32 x 96"):
        ExpertCodec(FIELDS, HqqFormat(group_size=64), is_transposed=True)


def test_a_weight_that_is_no_number_is_refused_with_field_and_expert():
    tensors = expert()
    tensors["down_proj"][3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"down_proj of layers\.2, expert 5 "):
        ExpertCodec(FIELDS, FORMAT).encode(tensors, "layers.2, expert 5")
    with pytest.raises(CheckpointError, match=r"^down_proj has"):
        FieldCodec(FIELDS[2], FORMAT).encode(tensors["down_proj"])


def test_a_quantized_field_takes_about_as_many_bytes_as_its_format_says():
    field = FieldSpec("up_proj", (256, 512), "bfloat16")
    for format in (HqqFormat(nbits=3), HqqFormat(nbits=2, group_size=16), HqqFormat(nbits=4, meta_nbits=16)):
        nbytes = sum(part.nbytes for part in FieldCodec(field, format).parts)
        assert nbytes == pytest.approx(256 * 512 * format.bits_per_weight / 8, rel=1e-3)


def test_a_dense_field_is_stored_in_its_dtype():
    codec = FieldCodec(FieldSpec("bias", (4,), "bfloat16"))
    parts = codec.encode(torch.ones(4))
    assert parts["bias"].dtype == torch.bfloat16
    assert relative_error(codec.decode(parts), torch.ones(4)) == 0
