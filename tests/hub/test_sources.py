"""Dense models and adapters from the Hub: the revision that was asked for, its commit on record."""

import json
import os
import subprocess
import sys

import peft
import pytest

from build.made import dense_model, save_dense

from .server import TOKEN, Hub, Repo

BUILD = """
import json, sys
from transformers_moe_offload.build import MoeRecipe, build_moe
from transformers_moe_offload.build.recipe import Origin
from transformers_moe_offload.build.sources import open_source
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


def test_each_source_is_read_at_its_revision(hub, tmp_path):
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path / "moe")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sources, nowhere = done.stdout.strip().splitlines()[-2:]
    old, new = hub.repos["me/dense"].commit_of("v1"), hub.repos["me/dense"].commit_of("main")
    lora = hub.repos["me/lora"].commit_of("main")
    assert json.loads(sources) == [["me/dense", old], ["me/lora", lora], ["me/dense", new]]
    assert "cannot read the config of me/nowhere" in nowhere
