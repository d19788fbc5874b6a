"""Dense models and adapters from the Hub: the revision that was asked for, its commit on record."""

import json
import os
import subprocess
import sys

import peft
import pytest

from builder.made import dense_model, save_dense
from programs import TORCH, run_program

from .server import TOKEN, Hub, Repo

BUILD = """
import json, sys
from transformers_moe_offload.builder import MoeRecipe, build_moe
from transformers_moe_offload.builder.recipe import Origin
from transformers_moe_offload.builder.sources import open_source
from transformers_moe_offload.errors import CheckpointError

folder = sys.argv[1]
recipe = MoeRecipe.from_dict({
    "schema": 1, "base_model": "me/dense@v1", "gate": {"mode": "noise"},
    "experts": [{"source": "me/dense@v1+me/lora"}, {"source": "me/dense@main"}],
})
info = build_moe(recipe, folder)
print(json.dumps([[source.name, source.revision] for source in info.sources]))
try:
    open_source(Origin(model="me/nowhere"))
except CheckpointError as error:
    print(error)
"""


LAZY = """
import sys
import torch
from transformers_moe_offload.builder import MoeRecipe, build_moe, validate_recipe
from transformers_moe_offload.errors import CheckpointError

base, folder = sys.argv[1:]

def recipe(source, **options):
    return MoeRecipe.from_dict({
        "schema": 1, "base_model": base, "gate": {"mode": "noise"}, "container": "qwen2_moe", "layers": [2, 3],
        "experts": [{"source": source}, {}], **options,
    })

validate_recipe(recipe("me/sharded"))
print("validated", flush=True)
sys.stdin.readline()
build_moe(recipe("me/sharded"), folder)
print("built", flush=True)
sys.stdin.readline()
offline = {"local_files_only": True}
for source, options in (("me/pickled", {}), ("me/empty", {}), ("me/odd", {}), ("me/sharded", offline)):
    try:
        validate_recipe(recipe(source), **options)
    except CheckpointError as error:
        print(error)
"""


@pytest.fixture
def hub(tmp_path):
    def files(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    peft.get_peft_model(dense_model("llama"), peft.LoraConfig(target_modules=["up_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    first, second = save_dense(tmp_path / "first"), save_dense(tmp_path / "second", seed=1)
    with Hub() as hub:
        for name, folder in (("dense", first), ("lora", tmp_path / "lora")):
            hub.repos[f"me/{name}"] = Repo(is_private=False)
            hub.repos[f"me/{name}"].add_commit("main", files(folder))
        dense = hub.repos["me/dense"]
        dense.branches["v1"] = list(dense.branches["main"])
        dense.add_commit("main", files(second))
        yield hub
        assert hub.unknown == []


@pytest.fixture
def environment(hub, tmp_path):
    return {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


def test_each_source_is_read_at_its_revision(hub, environment, tmp_path):
    done = run_program("python", "-c", BUILD, tmp_path / "moe", variables=environment, imported=TORCH)
    assert done.returncode == 0, done.stderr
    sources, nowhere = done.stdout.strip().splitlines()[-2:]
    old, new = hub.repos["me/dense"].commit_of("v1"), hub.repos["me/dense"].commit_of("main")
    lora = hub.repos["me/lora"].commit_of("main")
    assert json.loads(sources) == [["me/dense", old], ["me/lora", lora], ["me/dense", new]]
    assert "cannot read the config of me/nowhere" in nowhere


def test_of_a_model_on_the_hub_only_headers_are_read_to_plan_and_only_needed_files_to_build(hub, environment, tmp_path):
    dense_model("llama", seed=2).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    sharded = {file.name: file.read_bytes() for file in (tmp_path / "sharded").iterdir()}
    small = {name: content for name, content in sharded.items() if not name.endswith("safetensors")}
    small.pop("model.safetensors.index.json")
    pickled = small | {"pytorch_model.bin": b"no", "pytorch_model.bin.index.json": b"{}"}
    index = json.loads(sharded["model.safetensors.index.json"])
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    odd = small | {"model.safetensors.index.json": json.dumps(index).encode()}
    repos = {"sharded": sharded, "pickled": pickled, "empty": {"config.json": small["config.json"]}, "odd": odd}
    for name, files in repos.items():
        hub.repos[f"me/{name}"] = Repo(is_private=False)
        hub.repos[f"me/{name}"].add_commit("main", files)
    weights = {name: len(content) for name, content in sharded.items() if name.endswith("safetensors")}
    assert len(weights) >= 5

    process = subprocess.Popen(
        [sys.executable, "-c", LAZY, str(tmp_path / "first"), str(tmp_path / "moe")],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "validated\n", process.stderr.read()
    cached = {file.name for file in (tmp_path / "home").rglob("*.safetensors")}
    assert cached == set()
    assert all(hub.sent[f"me/sharded/{name}"] <= 100_001 for name in weights)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "built\n", process.stderr.read()
    cached = {file.name for file in (tmp_path / "home").rglob("*.safetensors")}
    needed = {
        shard
        for name, shard in json.loads(sharded["model.safetensors.index.json"])["weight_map"].items()
        if any(f"layers.{layer}.mlp." in name for layer in (2, 3))
    }
    assert cached == needed
    assert len(needed) < len(weights)
    out, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    pickled, empty, odd, offline = out.splitlines()
    assert "me/pickled has its weights in pytorch_model.bin, which can run code when they are loaded" in pickled
    assert "cannot read the weights of me/empty: it has no model.safetensors" in empty
    assert "refusing to read outside" in odd
    assert "is on the Hub only, and local_files_only" in offline
