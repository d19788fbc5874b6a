"""A model is made of the files that it was loaded from, whatever their paths lead to by now.

Everywhere the other files have tensors of the same names and shapes, with other values: two fine-tunes of one model.
"""

import copy
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from forked import in_a_child
from transformers_moe_offload import CheckpointError, OffloadConfig
from zoo.build import build

WAYS = {
    "auto": {},
    "copied": {"mmap": False},
    "past the page cache": {"mmap": False, "direct_io": True},
    "exact": {"arithmetic": "exact"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with `one/model` and `other/model`."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(["one", "other"]):
        build("qwen3_moe", seed=seed).save_pretrained(folder / name / "model", max_shard_size="200KB")
    return folder


@pytest.fixture(params=WAYS)
def way(request):
    return {"cache_budget": "50%"} | WAYS[request.param]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(**options) if options else None)


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


def router_gradients(model, token_ids):
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    return [p.grad for name, p in model.named_parameters() if name.endswith("gate.weight")]


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_does_not_depend_on_the_working_directory(two, way, token_ids, tmp_path, monkeypatch):
    monkeypatch.chdir(two / "one")
    here = load("model", **way)
    expected, gradients = logits(here, token_ids), router_gradients(here, token_ids)
    plain = weights_of(load("model"))
    early, trained, saved, restored = (load("model", **way) for _ in range(4))
    monkeypatch.chdir(two / "other")
    assert torch.equal(logits(early, token_ids), expected)
    assert torch.equal(logits(copy.deepcopy(early), token_ids), expected)
    assert all(map(torch.equal, router_gradients(trained, token_ids), gradients))
    assert in_a_child(lambda: torch.equal(logits(early, token_ids), expected))
    saved.save_pretrained(tmp_path)
    assert equal(weights_of(load(tmp_path)), plain)
    assert equal(weights_of(restored.moe_offload.restore()), plain)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_files_that_were_replaced_before_they_are_read_are_an_error(two, way, token_ids, tmp_path, is_in_place):
    shutil.copytree(two / "one" / "model", tmp_path / "model")
    # Dense weights are mapped by Transformers itself: of what lies under them, more than the experts would change.
    files = [file for file in sorted((tmp_path / "model").glob("*.safetensors"))]
    model = load(tmp_path / "model", **way)
    expected = logits(load(two / "one" / "model", **way), token_ids)
    if is_in_place:
        for file in files:
            os.utime(file)
    else:
        (tmp_path / "kept").mkdir()
        for file in files:
            file.rename(tmp_path / "kept" / file.name)
            shutil.copy2(two / "other" / "model" / file.name, file)
            assert file.stat().st_size == (tmp_path / "kept" / file.name).stat().st_size
    for work in (
        lambda: logits(model, token_ids),
        lambda: model(input_ids=token_ids).logits.sum().backward(),
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: copy.deepcopy(model)(input_ids=token_ids),
        lambda: model.moe_offload.restore(),
    ):
        with pytest.raises(CheckpointError, match=r"is not what it was when the model was loaded: .* Load the model"):
            work()
    if not is_in_place:
        for file in files:
            (tmp_path / "kept" / file.name).replace(file)
        assert torch.equal(logits(model, token_ids), expected)


def test_a_model_that_is_saved_over_its_own_files_goes_on(two, way, token_ids, tmp_path):
    shutil.copytree(two / "one" / "model", tmp_path / "model")
    model = load(tmp_path / "model", **way)
    expected = logits(load(two / "one" / "model", **way), token_ids)
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(logits(model, token_ids), expected)
    assert torch.equal(logits(copy.deepcopy(model), token_ids), expected)
    assert torch.equal(logits(load(tmp_path / "model", **way), token_ids), expected)


def test_files_of_the_hubs_cache_are_known_by_what_their_links_lead_to(two, way, token_ids, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(two / "one" / "model", blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    model, late = (load(snapshot, **way) for _ in range(2))
    expected = logits(load(two / "one" / "model", **way), token_ids)
    assert torch.equal(logits(model, token_ids), expected)
    for link in snapshot.glob("*.safetensors"):
        link.unlink()
        link.symlink_to(two / "other" / "model" / link.name)
    assert torch.equal(logits(model, token_ids), expected)
    with pytest.raises(CheckpointError, match="is inode"):
        logits(late, token_ids)
