"""Tensors are looked at where they are stored, and whatever is wrong with their file is an error of ours."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.index import read_index
from transformers_moe_offload.tensor_files.reading import MappedTensors


@pytest.fixture
def written(tmp_path):
    tensors = {"a": torch.randn(64, 32), "b": torch.arange(5), "none": torch.empty(0, 3), "c": torch.ones(7).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors, tmp_path / "model.safetensors"


def test_tensors_are_what_was_written_before_and_after_they_were_let_go(written):
    tensors, path = written
    stored, sight = read_index([path]), MappedTensors()
    for _ in range(2):
        for name, tensor in tensors.items():
            assert torch.equal(sight.tensor(stored[name]), tensor)
        kept = sight.tensor(stored["a"])
        sight.let_go()
        assert torch.equal(kept, tensors["a"])


def test_neighbours_in_a_file_are_in_one_piece_of_memory_and_nothing_is_copied(written):
    stored, sight = read_index([written[1]]), MappedTensors()
    first, second = sight.tensor(stored["a"]), sight.tensor(stored["b"])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.data_ptr() - first.data_ptr() == stored["b"].offset - stored["a"].offset


def test_what_is_not_aligned_to_its_elements_is_read(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (7 - len(header) % 4)  # the data begin between two multiples of 4
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    assert (8 + len(header)) % 4
    assert MappedTensors().tensor(read_index([path])["a"]).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_that_is_no_longer_what_it_was_is_an_error(damage, written):
    path = written[1]
    stored = read_index([path])
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=str(path)):
        MappedTensors().tensor(stored["a"])
