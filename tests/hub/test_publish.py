"""A mixture goes to a Hub, whole and with its card, and is loaded from there."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dense import dense_model
from moe_offload_cli.main import app
from transformers_moe_offload.builder import MoeRecipe, build_moe
from transformers_moe_offload.builder.publish import check_built, publish
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hub.upload import UploadError

from .server import TOKEN, Hub

REPO = "somebody/mixture"


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        yield hub
    assert hub.unknown == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    dense_model().save_pretrained(folder / "dense")
    (folder / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    recipe = {"base_model": str(folder / "dense"), "kind": "upcycle", "upcycle": {"num_experts": 2}}
    gate, output = {"mode": "random"}, {"max_shard_size": "40KB"}
    build_moe(MoeRecipe.from_dict({"schema": 1, "gate": gate, "output": output, **recipe}), folder / "mixture")
    return folder / "mixture"


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def uploaded(hub, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


def test_what_was_built_is_published_with_its_card_and_its_recipe(hub, built):
    assert publish(built, REPO, private=True, token=TOKEN) == f"{hub.endpoint}/{REPO}"
    assert uploaded(hub) == contents(built)
    assert {"README.md", "moe_offload_build.json", "moe_offload_info.json"} < uploaded(hub).keys()
    assert hub.repos[REPO].is_private
    assert ModelCard(uploaded(hub)["README.md"].decode()).data.license == "mit"


def test_what_is_there_can_be_loaded(hub, built, tmp_path):
    publish(built, REPO, token=TOKEN)
    for name, content in uploaded(hub).items():
        (tmp_path / name).write_bytes(content)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(built)(ids).logits)


def test_the_command_pushes_what_was_built(hub, built):
    result = CliRunner().invoke(app, ["push", str(built), REPO, "--create-pr", "--token", TOKEN])
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"pushed to {hub.endpoint}/{REPO}/discussions/1" in result.stdout.splitlines()
    assert uploaded(hub, "refs/pr/1") == contents(built)
    assert uploaded(hub) == {}


def test_the_command_builds_and_pushes_with_the_repository_on_the_card(hub, built, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema: 1\nbase_model: {built.parent / 'dense'}\nkind: upcycle\nupcycle: {{num_experts: 2}}\n"
        f"gate: {{mode: noise}}\nhub: {{private: true}}\n"
    )
    arguments = ["build", str(recipe), str(tmp_path / "out"), "--push", REPO, "--token", TOKEN]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"pushed to {REPO}" in result.stdout.splitlines()
    assert uploaded(hub) == contents(tmp_path / "out")
    assert hub.repos[REPO].is_private
    assert f'from_pretrained("{REPO}"' in uploaded(hub)["README.md"].decode()


def test_a_push_that_cannot_be_is_noticed_before_the_build(hub, built, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schema: 1\nbase_model: {built.parent / 'dense'}\nkind: upcycle\ngate: {{mode: noise}}\n")
    arguments = ["build", str(recipe), str(tmp_path / "out"), "--push", REPO, "--token", "hf_wrong"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "cannot upload to 'somebody/mixture'" in result.output
    assert not (tmp_path / "out").exists()


def test_no_commit_in_between_can_be_loaded(hub, built):
    publish(built, REPO, token=TOKEN)
    publish(built, REPO, token=TOKEN)
    commits = [hub.repos[REPO].trees[commit] for commit in hub.repos[REPO].branches["main"]]
    assert all("config.json" not in tree or contents(built).items() <= tree.items() for tree in commits)


@pytest.mark.parametrize(
    ("status", "advice"), [(403, "does the token allow"), (409, "another commit is being written")]
)
def test_whatever_the_hub_refuses_the_mixture_stays_here(hub, built, status, advice):
    before = contents(built)
    hub.refuses = lambda method, path: status if "/commit/" in path else False
    with pytest.raises(UploadError, match=advice):
        publish(built, REPO, token=TOKEN)
    assert contents(built) == before


@pytest.fixture
def damaged(built, tmp_path):
    """A copy to be damaged."""
    for name, content in contents(built).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_folder_that_lacks_a_part_is_not_published(hub, damaged, name):
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        publish(damaged, REPO, token=TOKEN)
    assert hub.repos == {}


def test_a_folder_without_weights_or_with_a_shard_too_few_is_not_published(hub, damaged):
    shards = sorted(damaged.glob("*.safetensors"))
    shards[0].unlink()
    with pytest.raises(CheckpointError, match="that file does not hold it"):
        publish(damaged, REPO, token=TOKEN)
    for shard in shards[1:]:
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"is not a complete checkpoint: it has no model\.safetensors"):
        publish(damaged, REPO, token=TOKEN)
    assert hub.repos == {}


def test_a_damaged_weight_is_found(hub, damaged):
    shard = max(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = CliRunner().invoke(app, ["push", str(damaged), REPO, "--token", TOKEN])
    assert result.exit_code == 2
    assert "damaged" in result.output
    assert hub.repos == {}


def test_every_byte_of_the_weights_is_counted(built):
    counted = []
    check_built(built, counted.append)
    assert sum(counted) == sum(file.stat().st_size for file in built.glob("model*.safetensors"))


def test_without_a_card_there_is_a_warning(hub, damaged, caplog):
    (damaged / "README.md").unlink()
    publish(damaged, REPO, token=TOKEN)
    assert "has no README.md: the Hub will show no licence" in caplog.text
    assert HfApi(endpoint=hub.endpoint, token=TOKEN).repo_exists(REPO)
