"""Checkpoints go to a Hub and come back, through the real client; what is not whole does not get there."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard

from models.mixtures import mixture, write_adapter
from programs import TORCH, run_program
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.hf.prebuilt.publish import LAYOUT, check_prebuilt
from transformers_moe_offload.hub.upload import UploadError, upload
from zoo.build import build

from .server import TOKEN, Hub, Repo

REPO = "somebody/tiny-3bit"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    from typer.testing import CliRunner

    from moe_offload_cli.main import app

    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    result = CliRunner().invoke(app, ["quantize", str(source), str(folder), "--experts", "4x16", "--dense", "8x16"])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def uploaded(hub, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


ROUND_TRIP = """
import sys
import torch
from typer.testing import CliRunner
from transformers import AutoModelForCausalLM
from moe_offload_cli.main import app

source, folder, repo = sys.argv[1:]
options = ["--experts", "4x16", "--dense", "8x16", "--private", "--push", repo]
result = CliRunner().invoke(app, ["quantize", source, folder, *options])
assert result.exit_code == 0, (result.output, result.exception)
print(result.stdout.splitlines()[-1])
ids = torch.arange(12)[None]
first, second = (AutoModelForCausalLM.from_pretrained(name) for name in (folder, repo))
second.push_to_hub("somebody/again")
third = AutoModelForCausalLM.from_pretrained("somebody/again")
expected = first(input_ids=ids).logits
print([torch.equal(model(input_ids=ids).logits, expected) for model in (second, third)])
"""


def environment(hub, tmp_path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }


def test_a_model_on_the_hub_is_quantized_pushed_and_loaded_by_its_id(hub, source, tmp_path):
    hub.repos["somebody/plain"] = Repo(is_private=False)
    revision = hub.repos["somebody/plain"].add_commit("main", contents(source))
    folder = tmp_path / "folder"
    command = ["python", "-c", ROUND_TRIP, "somebody/plain", folder, REPO]
    result = run_program(*command, variables=environment(hub, tmp_path), imported=TORCH)
    assert result.stdout.splitlines() == [f"pushed to {hub.endpoint}/{REPO}", "[True, True]"], result.stderr
    assert uploaded(hub) == contents(folder)
    assert hub.repos[REPO].is_private
    assert json.loads(hub.files(REPO)["moe_offload.recipe.json"])["source"]["revision"] == revision
    weights = {name for name in contents(folder) if name.endswith(".safetensors")}
    assert all(hub.files("somebody/again")[name] == hub.files(REPO)[name] for name in weights)
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.base_model == "somebody/plain"


PUSH_OF_A_MIXTURE = """
import sys
import torch
from transformers_moe_offload.models.adapter_moe import AdapterMoeForCausalLM

folder, target = sys.argv[1:]
ids = torch.arange(12)[None]
model = AdapterMoeForCausalLM.from_pretrained(folder)
model.push_to_hub("somebody/pushed")
model.save_pretrained(target, push_to_hub=True, repo_id="somebody/saved")
names = ("somebody/pushed", "somebody/saved", target)
others = [AdapterMoeForCausalLM.from_pretrained(name) for name in names]
print([torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits) for other in others])
"""


def test_a_mixture_of_adapters_comes_back_from_the_hub_with_its_adapters(hub, tmp_path):
    mixture([write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")], rank=4).save_pretrained(
        tmp_path / "mixture"
    )
    command = ["python", "-c", PUSH_OF_A_MIXTURE, tmp_path / "mixture", tmp_path / "target"]
    result = run_program(*command, variables=environment(hub, tmp_path), imported=TORCH)
    assert result.stdout.splitlines() == ["[True, True, True]"], result.stderr


def test_everything_but_the_index_is_there_before_the_index(hub, api, quantized):
    upload(api, quantized, REPO, LAYOUT)
    (*_, before, last) = (hub.repos[REPO].trees[commit] for commit in hub.repos[REPO].branches["main"])
    assert set(last) - set(before) == {INDEX_NAME}
    assert uploaded(hub) == contents(quantized)
    assert not hub.repos[REPO].is_private


def test_in_no_commit_do_weights_of_two_checkpoints_meet(hub, api, quantized):
    api.create_repo(REPO)
    old = {INDEX_NAME: b"{}", "moe_offload-00001-of-00099.safetensors": b"old", "notes.txt": b"kept"}
    hub.repos[REPO].add_commit("main", hub.files(REPO) | old)
    upload(api, quantized, REPO, LAYOUT)
    for commit in hub.repos[REPO].branches["main"][2:]:
        assert "moe_offload-00001-of-00099.safetensors" not in hub.repos[REPO].trees[commit]
        assert hub.repos[REPO].trees[commit].get(INDEX_NAME) != b"{}"
    assert uploaded(hub) == contents(quantized) | {"notes.txt": b"kept"}


def test_an_upload_that_broke_off_is_resumed_and_sends_no_weights_twice(hub, api, quantized):
    hub.refuses = lambda method, path: "/commit/" in path
    with pytest.raises(UploadError, match="403"):
        upload(api, quantized, REPO, LAYOUT)
    assert INDEX_NAME not in hub.files(REPO)
    assert len(hub.objects) >= len(list(quantized.glob("*.safetensors")))
    hub.refuses = lambda method, path: method == "PUT"
    with pytest.raises(UploadError):  # the index itself is new
        upload(api, quantized, REPO, LAYOUT)
    assert INDEX_NAME not in hub.files(REPO)
    hub.refuses = lambda method, path: False
    upload(api, quantized, REPO, LAYOUT)
    assert uploaded(hub) == contents(quantized)


def test_a_branch_is_created_and_main_stays_as_it_is(hub, api, quantized):
    upload(api, quantized, REPO, LAYOUT, revision="4bit")
    assert uploaded(hub, "4bit") == contents(quantized)
    assert uploaded(hub) == {}


def test_an_intact_folder_passes_and_every_byte_of_its_weights_is_counted(quantized):
    counted = []
    check_prebuilt(quantized, counted.append)
    assert sum(counted) == sum(file.stat().st_size for file in quantized.glob("*.safetensors"))


@pytest.fixture
def damaged(quantized, tmp_path):
    """A copy to be damaged."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name, content in contents(quantized).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", [INDEX_NAME, "config.json", "moe_offload_required.py"])
def test_a_folder_that_lacks_a_part_is_not_pushed(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=f"is not a complete prebuilt checkpoint: it has no {name}"):
        check_prebuilt(damaged)


def test_a_folder_that_lacks_a_shard_is_not_pushed(damaged):
    next(damaged.glob("*.safetensors")).unlink()
    with pytest.raises(
        CheckpointError, match=r"index\.json places .* in moe_offload-.*, but that file does not hold it"
    ):
        check_prebuilt(damaged)


def test_a_folder_with_a_damaged_expert_is_not_pushed(damaged):
    shard = damaged / "moe_offload-00001-of-00005.safetensors"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"records with checksum .* damaged"):
        check_prebuilt(damaged)
