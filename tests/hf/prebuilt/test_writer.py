"""What lands in the folder of a prebuilt checkpoint."""

import json
import threading
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.prebuilt.layout import shards_of
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.hf.prebuilt.writer import Prebuilt, write_prebuilt
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.tensor_files.index import check_index_file, read_index

from .made import FIELDS, HOT_LAYER, NUM_EXPERTS, RECIPE, dense, files, layer, prebuilt, record, write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write(folder)
    return folder


def test_every_layer_has_a_shard_and_the_dense_weights_have_theirs(written):
    assert sorted(file.name for file in written.iterdir()) == [
        "config.json",
        "moe_offload-00001-of-00004.safetensors",
        "moe_offload-00002-of-00004.safetensors",
        "moe_offload-00003-of-00004.safetensors",
        "moe_offload-00004-of-00004.safetensors",
        "moe_offload.recipe.json",
        "moe_offload.safetensors.index.json",
        "moe_offload_required.py",
    ]


def test_a_row_is_an_expert_s_record_and_zeros_up_to_a_page(written):
    stack = load_file(written / "moe_offload-00002-of-00004.safetensors")["model.layers.1.mlp.experts.records"]
    layout = RecordLayout(FIELDS)
    assert stack.shape == (NUM_EXPERTS, 8192)
    assert all(torch.equal(row[: layout.nbytes], record(1, expert)) for expert, row in enumerate(stack))
    assert not stack[:, layout.nbytes :].any()


def test_every_row_lies_at_a_page_of_the_file_and_has_its_checksum(written):
    tensors = read_index([written / "moe_offload-00001-of-00004.safetensors"])
    assert tensors["model.layers.0.mlp.experts.records"].offset % 4096 == 0
    loaded = load_file(written / "moe_offload-00001-of-00004.safetensors")
    rows = loaded["model.layers.0.mlp.experts.records"]
    expected = [zlib.crc32(row.numpy().tobytes()) for row in rows]
    assert loaded["model.layers.0.mlp.experts.checksums"].tolist() == expected


def test_hot_experts_have_a_stack_of_their_own_and_checksums_are_by_expert(written):
    shard = written / "moe_offload-00003-of-00004.safetensors"
    tensors, loaded = read_index([shard]), load_file(shard)
    path = f"model.layers.{HOT_LAYER}.mlp.experts"
    rows, hot, checksums = (loaded[f"{path}.{name}"] for name in ("records", "hot_records", "checksums"))
    assert (rows.shape, hot.shape) == ((NUM_EXPERTS - 2, 8192), (2, 12288))
    assert tensors[f"{path}.hot_records"].offset % 4096 == 0
    in_order = [hot[0], rows[0], rows[1], hot[1], rows[2]]
    for expert, row in enumerate(in_order):
        made = record(HOT_LAYER, expert)
        assert torch.equal(row[: len(made)], made)
        assert zlib.crc32(row.numpy().tobytes()) == checksums[expert]


def test_dense_tensors_keep_their_names_dtypes_and_values(written):
    shard = written / "moe_offload-00004-of-00004.safetensors"
    loaded = load_file(shard)
    expected = {name: tensor for number in range(3) for name, tensor in dense(number).read().items()}
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(loaded[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in expected.items())
    with safe_open(shard, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_index_agrees_with_the_shards(written):
    tensors = read_index(sorted(written.glob("*.safetensors")))
    check_index_file(written / INDEX_NAME, tensors)
    index = json.loads((written / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_the_same_content_gives_the_same_bytes_with_any_number_of_workers(written, tmp_path):
    for workers in (1, 3, 8):
        write(tmp_path / str(workers), workers=workers)
        assert files(tmp_path / str(workers)) == files(written)


def test_no_more_experts_are_being_encoded_or_waiting_than_there_are_workers(tmp_path):
    lock, counts = threading.Lock(), {"now": 0, "most": 0}

    def counted(number, expert):
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts.values())
        made = record(number, expert)
        with lock:
            counts["now"] -= 1
        return made

    write(tmp_path / "folder", prebuilt(read=counted), workers=2)
    assert 1 <= counts["most"] <= 2


def test_dense_shards_are_cut_where_they_would_become_too_large():
    content = [dense(number) for number in range(5)]
    shards = shards_of([], content, max_shard_bytes=2 * content[0].nbytes)
    assert [len(shard.tensors) for shard in shards] == [6, 6, 3]
    assert [shard.name for shard in shards][-1] == "moe_offload-00003-of-00003.safetensors"


def test_a_tensor_larger_than_a_shard_may_be_has_one_of_its_own():
    assert len(shards_of([], [dense(0), dense(1)], max_shard_bytes=1)) == 2


def test_progress_counts_every_byte_of_the_weight_files_once(tmp_path):
    counted = []
    write_prebuilt(tmp_path / "folder", prebuilt(), RECIPE, advance=counted.append)
    assert sum(counted) == sum(file.stat().st_size for file in (tmp_path / "folder").glob("*.safetensors"))


def test_without_a_listener_there_is_a_progress_bar_that_transformers_can_switch_off(tmp_path, capsys):
    from transformers.utils import logging

    logging.enable_progress_bar()
    write_prebuilt(tmp_path / "one", prebuilt(), RECIPE)
    assert "Writing shards: 100%" in capsys.readouterr().err
    logging.disable_progress_bar()
    try:
        write_prebuilt(tmp_path / "two", prebuilt(), RECIPE)
    finally:
        logging.enable_progress_bar()
    assert "Writing shards" not in capsys.readouterr().err


def test_an_expert_that_cannot_be_encoded_stops_it_and_leaves_no_broken_shard(tmp_path):
    def failing(number, expert):
        if (number, expert) == (1, 3):
            raise CheckpointError("model.layers.1.mlp.experts, expert 3: holds inf")
        return record(number, expert)

    with pytest.raises(CheckpointError, match="expert 3: holds inf"):
        write(tmp_path, prebuilt(read=failing))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "moe_offload-00001-of-00004.safetensors",
        "moe_offload.recipe.json",
    ]


def test_too_little_room_is_noticed_before_the_first_shard(tmp_path):
    huge = layer(0)
    huge = type(huge)(huge.module, 10**12, huge.fields, huge.record)
    with pytest.raises(CheckpointError, match=r"takes [\d,]+ more bytes in .*, but [\d,]+ are free"):
        write(tmp_path, Prebuilt([huge], [], {}))
    assert [file.name for file in tmp_path.iterdir()] == ["moe_offload.recipe.json"]
