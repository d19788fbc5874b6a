"""Mixtures are edited: what changes is written, what does not is kept, and what comes out loads and computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dense import dense_model
from transformers_moe_offload.builder import MoeRecipe, build_moe
from transformers_moe_offload.builder.edit import add_expert, drop_expert, merge_to_dense, replace_expert
from transformers_moe_offload.builder.gates import STATISTICS_NAME, RidgeStatistics
from transformers_moe_offload.builder.recipe import Expert
from transformers_moe_offload.errors import CheckpointError, RecipeError, UnsupportedModelError
from transformers_moe_offload.output import shards as shards_module
from zoo.build import build

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Dense models by family and seed, saved."""
    root = tmp_path_factory.mktemp("models")

    def saved(family: str, seed: int = 0):
        folder = root / f"{family}-{seed}"
        if not folder.exists():
            dense_model(family, seed=seed).save_pretrained(folder)
        return folder

    return saved


@pytest.fixture
def built(models, tmp_path):
    """Builds a mixture of dense models of a family."""

    def make(family: str = "llama", seeds=(0, 1, 2), **fields):
        values = {
            "schema": 1,
            "base_model": str(models(family)),
            "experts": [{"name": f"e{seed}", "source": str(models(family, seed))} for seed in seeds],
            "experts_per_token": 2,
            "gate": {"mode": "random"},
            "checks": {"similarity": "off"},
            "output": {"max_shard_size": "30KB"},
        }
        build_moe(MoeRecipe.from_dict(values | fields), tmp_path / "mixture")
        return tmp_path / "mixture"

    return make


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def weights(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.startswith("model")}


def logits(folder) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(IDS).logits


FAMILIES = ("llama", "qwen3", "granite", "ernie4_5")
"""Mixtral; Qwen3-MoE; experts of a layer in one tensor; a correction (1, E) beside the router."""


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_added_and_dropped_again_leaves_the_mixture_as_it_was(built, models, family):
    folder = built(family)
    before, computed = weights(folder), logits(folder)
    add_expert(folder, Expert(source=str(models(family, 3)), name="third"))
    assert logits(folder).shape == computed.shape
    assert weights(folder) != before
    drop_expert(folder, 3)
    assert weights(folder) == before
    assert torch.equal(logits(folder), computed)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["mixture"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_the_same_whether_an_expert_was_in_the_recipe_or_added(built, models, family, tmp_path):
    folder = built(family, seeds=(0, 1, 2, 3))
    whole = tensors(folder)
    drop_expert(folder, 3, out=tmp_path / "fewer")
    router = [name for name in whole if "router" in name or name.endswith("gate.weight")]
    rows = {index: whole[name][3] for index, name in enumerate(sorted(router))}
    add_expert(tmp_path / "fewer", Expert(source=str(models(family, 3)), name="e3"), gate=rows)
    again = tensors(tmp_path / "fewer")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert torch.equal(logits(tmp_path / "fewer"), logits(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_is_exchanged_and_its_rows_stay(built, models, family, tmp_path):
    folder = built(family, seeds=(0, 1, 3))
    expected = tensors(folder)
    other = tmp_path / "other"
    other.mkdir()
    folder.rename(other / "mixture")
    folder = built(family, seeds=(0, 2, 3))
    replace_expert(folder, 1, Expert(source=str(models(family, 1))))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(folder).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_a_dense_model_are_merged_into_it_again(built, models, family, tmp_path):
    folder = built(family, seeds=(0, 0, 0))
    dense = merge_to_dense(folder, tmp_path / "dense")
    base = tensors(models(family))
    merged = tensors(dense)
    assert merged.keys() == base.keys()
    assert all((merged[name] - base[name]).abs().max() < 1e-6 for name in base)
    assert (logits(dense) - logits(models(family))).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_becomes_the_block_of_a_dense_model(built, models, family, tmp_path):
    merge_to_dense(built(family), tmp_path / "dense", experts=2)
    merged, base, source = tensors(tmp_path / "dense"), tensors(models(family)), tensors(models(family, 2))
    for name, tensor in merged.items():
        assert torch.equal(tensor, (source if ".mlp." in name else base)[name])


def test_an_average_is_the_mean_of_the_experts(built, models, tmp_path):
    merge_to_dense(built(), tmp_path / "dense")
    name = "model.layers.1.mlp.down_proj.weight"
    mean = torch.stack([tensors(models("llama", seed))[name] for seed in range(3)]).mean(0)
    assert torch.allclose(tensors(tmp_path / "dense")[name], mean, atol=1e-6)


def test_a_dense_model_is_of_the_family_that_was_asked_for(built, tmp_path):
    merge_to_dense(built(), tmp_path / "dense", family="mistral")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "mistral"
    with pytest.raises(RecipeError, match="family='qwen3', but a mixtral is made of llama or mistral"):
        merge_to_dense(tmp_path / "mixture", tmp_path / "other", family="qwen3")


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "phimoe"])
def test_mixtures_of_other_makers_are_edited_by_what_is_in_them(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "plain")
    before, computed = tensors(tmp_path / "plain"), logits(tmp_path / "plain")
    out = add_expert(tmp_path / "plain", Expert(), copy_of=1, out=tmp_path / "more")
    assert logits(out).isfinite().all()
    count = 1 + max(int(key.split(".experts.")[1].split(".")[0]) for key in before if ".experts." in key)
    last = {key: value for key, value in tensors(out).items() if f".experts.{count}." in key}
    assert last
    assert all(
        torch.equal(value, before[key.replace(f".experts.{count}.", ".experts.1.")]) for key, value in last.items()
    )
    drop_expert(out, count)
    assert torch.equal(logits(out), computed)


def test_only_files_in_which_something_changes_are_written(built, monkeypatch):
    folder = built()
    inodes = {file.name: file.stat().st_ino for file in folder.iterdir()}
    written = []
    fill = shards_module.fill_shards
    monkeypatch.setattr(
        "transformers_moe_offload.builder.edit.rewrite_files.fill_shards",
        lambda place, shards, *rest: written.extend(s.name for s in shards) or fill(place, shards, *rest),
    )
    drop_expert(folder, 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {file.name for file in folder.iterdir() if file.stat().st_ino == inodes[file.name]}
    shards = {name for name in inodes if name.endswith(".safetensors")}
    assert 0 < len(written) < len(shards)
    assert shards & kept >= set(index.values()) - set(written)
    assert not kept & set(written)


def test_the_mixture_is_whole_until_the_edited_one_is(built, monkeypatch):
    folder = built()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        drop_expert(folder, 0)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    drop_expert(folder, 0)
    assert logits(folder).isfinite().all()
    assert [file.name for file in folder.parent.iterdir()] == ["mixture"]


def test_config_card_and_figures_tell_of_it(built, models, tmp_path):
    folder = built()
    (folder / "mine.txt").write_text("mine")
    add_expert(folder, Expert(source=str(models("llama", 3)), name="third"))
    drop_expert(folder, 0)
    assert json.loads((folder / "config.json").read_text())["num_local_experts"] == 3
    info = json.loads((folder / "moe_offload_info.json").read_text())
    assert info["experts"] == ["e1", "e2", "third"]
    assert info["parameters"]["total"] == sum(tensor.numel() for tensor in tensors(folder).values())
    assert info["bytes"] == sum(tensor.nbytes for tensor in tensors(folder).values())
    card = (folder / "README.md").read_text()
    assert card.count("## Edits") == 1
    assert "- Expert 3, third, was added." in card
    assert "- Expert 0 was dropped" in card
    assert len(json.loads((folder / "moe_offload_build.json").read_text())["edits"]) == 2
    assert (folder / "mine.txt").read_text() == "mine"


def test_rows_are_copied_with_noise_of_their_size_and_by_the_seed(built, models, tmp_path):
    folder = built()
    router = "model.layers.0.block_sparse_moe.gate.weight"
    old = tensors(folder)[router]

    def row(name, **options):
        out = tmp_path / name
        return tensors(add_expert(folder, Expert(), copy_of=1, out=out, **options))[router][3]

    assert torch.equal(row("plain"), old[1])
    noisy = row("noisy", noise_scale=0.1)
    assert (noisy - old[1]).std().item() == pytest.approx(0.1 * old.pow(2).mean().sqrt().item(), rel=0.5)
    assert torch.equal(row("again", noise_scale=0.1), noisy)
    assert not torch.equal(row("seed", noise_scale=0.1, seed=1), noisy)
    assert torch.allclose(row("mean", gate="mean"), old.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy_of": 3}, "copy_of=3, but there are 3 experts"),
        ({"copy_of": 0, "gate": -1}, "gate=-1, but there are 3 experts"),
        ({"copy_of": 0, "gate": "ridge"}, "gate='ridge' is neither 'mean'"),
        ({"copy_of": 0, "gate": {0: torch.zeros(32)}}, "gate has no row for layer 1"),
        ({}, "give either expert.source, a dense model to make the expert of, or copy_of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(built, options, message):
    folder = built()
    before = weights(folder)
    with pytest.raises(RecipeError, match=message):
        add_expert(folder, Expert(), **options)
    assert weights(folder) == before


def test_a_dense_model_of_another_kind_or_size_is_refused(built, models, tmp_path):
    folder = built()
    with pytest.raises(RecipeError, match="is a qwen3; experts of a mixtral are made of llama or mistral"):
        add_expert(folder, Expert(source=str(models("qwen3"))))
    dense_model(intermediate_size=512).save_pretrained(tmp_path / "wide")
    with pytest.raises(RecipeError, match=r"wide has \[512, 32\] .* have room for"):
        add_expert(folder, Expert(source=str(tmp_path / "wide")))


def test_a_token_must_still_find_as_many_experts_as_it_visits(built):
    folder = built(seeds=(0, 1))
    with pytest.raises(UnsupportedModelError, match="a token visits 2 experts, and there would be 1"):
        drop_expert(folder, 0)


def test_experts_in_groups_are_not_made_uneven(tmp_path):
    build("deepseek_v3").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="4 groups"):
        drop_expert(tmp_path, 0)


def test_a_file_that_held_nothing_but_a_dropped_expert_is_gone(built):
    folder = built()
    names = {file.name for file in folder.glob("*.safetensors")}
    drop_expert(folder, 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert set(index["weight_map"].values()) < names
    assert logits(folder).isfinite().all()


def test_what_has_no_experts_is_refused(models, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"\(llama\) stores no experts one by one"):
        drop_expert(models("llama"), 0)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        drop_expert(tmp_path, 0)


SHIPPED = Path(__file__).parents[3] / "examples" / "models"
TEXTS = {
    "prose": "The command reads each line of its input and writes it to the output, unless an option says so. ",
    "python": "def read(path):\n    with open(path) as stream:\n        return [line.strip() for line in stream]\n\n",
    "c": "static int read(struct file *file, char *buffer)\n{\n\treturn file->ops->read(file, buffer);\n}\n\n",
}


def specialists(*names: str, **fields) -> MoeRecipe:
    experts = [
        {
            "name": name,
            "source": {"adapter": str(SHIPPED / f"tiny-dense-{name}")},
            "positive_prompts": [20 * TEXTS[name]],
        }
        for name in names
    ]
    base = {"schema": 1, "base_model": str(SHIPPED / "tiny-dense"), "experts_per_token": 1, "dtype": "float32"}
    return MoeRecipe.from_dict({**base, "experts": experts, **fields})


def test_with_statistics_an_expert_s_own_texts_give_the_gates_of_a_build_with_all(tmp_path):
    build_moe(specialists("prose", "python", "c"), tmp_path / "whole")
    build_moe(specialists("prose", "python"), tmp_path / "fewer")
    expert = specialists("c").experts[0]
    add_expert(tmp_path / "fewer", expert, base=str(SHIPPED / "tiny-dense"))
    whole, grown = tensors(tmp_path / "whole"), tensors(tmp_path / "fewer")
    assert grown.keys() == whole.keys()
    for name, tensor in whole.items():
        assert (grown[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name
    drop_expert(tmp_path / "fewer", 2)
    assert RidgeStatistics(tmp_path / "fewer" / STATISTICS_NAME).about.experts == ("prose", "python")
    replace_expert(tmp_path / "fewer", 0, Expert(), copy_of=1)
    assert not (tmp_path / "fewer" / STATISTICS_NAME).exists()
