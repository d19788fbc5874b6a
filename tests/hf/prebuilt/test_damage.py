"""A damaged byte anywhere in a prebuilt checkpoint is an error that names the file, never another answer."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import CheckpointError, HqqFormat, MoeOffloadError, OffloadConfig
from transformers_moe_offload.tensor_files.index import read_header, read_index

FORMAT = HqqFormat(group_size=16)


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prebuilt") / "saved"
    config = OffloadConfig(experts=FORMAT, dense=FORMAT)
    AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config).save_pretrained(folder)
    return folder


@pytest.fixture
def restored(saved):
    before = {path: path.read_bytes() for path in saved.glob("*.safetensors")}
    yield saved
    for path, content in before.items():
        path.write_bytes(content)


def flip(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


KINDS = [
    "weight_codes", "weight_scale", "weight_zero", "embed_tokens.weight", "norm.weight", "q_norm.weight", "gate.weight",
    "lm_head.weight", "experts.checksums", "weight_scale_range", "weight_zero_range",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_damaged_dense_tensor_is_named_with_its_file_when_it_is_loaded(restored, kind, end):
    tensors = read_index(restored.glob("*.safetensors"))
    tensor = next(one for name, one in tensors.items() if name.endswith(kind))
    flip(tensor.file.path, tensor.offset if end == "first" else tensor.offset + tensor.nbytes - 1)
    with pytest.raises(CheckpointError, match=rf"{tensor.file.path} holds tensor {tensor.name} .*it was written with"):
        AutoModelForCausalLM.from_pretrained(restored)


def test_every_kind_of_dense_tensor_is_among_those(saved):
    names = {name.rpartition(".")[2] for name in read_index(saved.glob("*.safetensors"))}
    assert names == {"records", *(kind.rpartition(".")[2] for kind in KINDS)}


def test_a_damaged_header_is_an_error_or_changes_nothing(restored, token_ids):
    rng = random.Random(0)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(restored)(input_ids=token_ids).logits
    path = max(restored.glob("*.safetensors"))
    whole = path.read_bytes()
    end = min(tensor.offset for tensor in read_header(path))
    for place in rng.sample(range(8, end), 20):
        flip(path, place, 1 << rng.randrange(8))
        try:
            with torch.no_grad():
                found = AutoModelForCausalLM.from_pretrained(restored)(input_ids=token_ids).logits
        except MoeOffloadError:
            found = expected
        path.write_bytes(whole)
        assert torch.equal(found, expected), f"byte {place} of {end}"


def test_files_without_checksums_load_as_they_are(restored, token_ids):
    """Another program that writes the tensors again leaves them out."""
    from safetensors.torch import load_file, save_file

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(restored)(input_ids=token_ids).logits
    path = max(restored.glob("*.safetensors"))
    save_file(load_file(path), path, metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(restored)(input_ids=token_ids).logits, expected)
