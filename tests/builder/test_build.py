"""What is built: experts in their places, bytes that depend on nothing but the recipe, and nothing if it is wrong."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builder.made import NUM_LAYERS, SIZES, recipe_of, save_dense
from transformers_moe_offload.builder import build_moe, validate_recipe
from transformers_moe_offload.builder.checks import CheckFailedError
from transformers_moe_offload.builder.recipe import Expert, Gate, Origin, Output, SharedExpert, Split, Stem, Upcycle
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.builder.writing import mixture
from transformers_moe_offload.errors import CheckpointError, RecipeError

TOKENS = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model, two fine-tunes of it, and one whose blocks are wider."""
    folder = tmp_path_factory.mktemp("models")
    base = save_dense(folder / "base")
    state = load_file(base / "model.safetensors")
    found = {"base": base}
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        tuned = save_dense(folder / name)
        save_file(
            {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in state.items()},
            tuned / "model.safetensors",
            metadata={"format": "pt"},
        )
        found[name] = tuned
    found["wide"] = save_dense(folder / "wide", seed=3, intermediate_size=72)
    return found


def built(recipe, folder, **options):
    return build_moe(recipe, folder, advance=lambda _: None, **options)


def logits(folder, expert=None):
    """What a checkpoint says, with everything sent to one expert if one is given."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    if expert is not None:
        for module in model.modules():
            if hasattr(module, "gate_up_proj"):
                module.register_forward_pre_hook(
                    lambda _, args: (args[0], torch.full_like(args[1][:, :1], expert), torch.ones_like(args[2][:, :1]))
                )
    with torch.no_grad():
        return model(TOKENS).logits


def dense_logits(base, blocks, layers=range(NUM_LAYERS)):
    """The base model with another model's blocks in some layers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    others = AutoModelForCausalLM.from_pretrained(blocks)
    for layer in layers:
        model.model.layers[layer].mlp = others.model.layers[layer].mlp
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("container", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_a_token_that_visits_one_expert_meets_the_blocks_of_its_source(models, tmp_path, container):
    recipe = recipe_of(models["base"], models["one"], models["wide"], models["two"], container=container)
    info = built(recipe, tmp_path / "moe")
    assert info.checks.forced_expert <= 5e-6
    for expert, name in enumerate(("one", "wide", "two")):
        expected = dense_logits(models["base"], models[name])
        torch.testing.assert_close(logits(tmp_path / "moe", expert), expected, atol=1e-5, rtol=0)


def test_layers_that_are_left_out_keep_the_base_models_block(models, tmp_path):
    recipe = recipe_of(models["base"], models["one"], models["two"], layers=(1, 4))
    built(recipe, tmp_path / "moe")
    expected = dense_logits(models["base"], models["two"], layers=(1, 4))
    torch.testing.assert_close(logits(tmp_path / "moe", 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("container", ["qwen2_moe", "glm4_moe"])
def test_with_a_shared_expert_that_others_are_differences_to_they_add_up_to_their_sources(models, tmp_path, container):
    shared = [SharedExpert(delta=True)]
    recipe = recipe_of(models["base"], models["one"], models["two"], container=container, shared_experts=shared)
    built(recipe, tmp_path / "moe")
    for expert, name in enumerate(("one", "two")):
        expected = dense_logits(models["base"], models[name])
        torch.testing.assert_close(logits(tmp_path / "moe", expert), expected, atol=1e-5, rtol=0)


def test_a_shared_expert_adds_its_share_and_a_gated_one_what_its_gate_lets_through(models, tmp_path):
    for container in ("qwen2_moe", "solar_open"):
        shared = [SharedExpert(source=Origin(model=str(models["two"])), residual_scale=0.5)]
        recipe = recipe_of(models["base"], models["one"], container=container, shared_experts=shared)
        recipe = type(recipe)(**{**vars(recipe), "experts": [*recipe.experts, Expert()], "experts_per_token": 2})
        info = built(recipe, tmp_path / container)
        assert info.checks.forced_expert <= 5e-6
        assert info.parameters.shared > 0
    gated = recipe_of(models["base"], models["one"], container="qwen2_moe", shared_experts=[SharedExpert(gated=True)])
    assert built(gated, tmp_path / "gated").checks.forced_expert <= 5e-6
    with pytest.raises(RecipeError, match="no gate for its shared expert"):
        validate_recipe(type(gated)(**{**vars(gated), "container": "glm4_moe", "experts": gated.experts * 2}))


@pytest.mark.parametrize("granularity", [1, 2, 5])
def test_all_parts_of_upcycled_copies_together_are_the_dense_model(models, tmp_path, granularity):
    """Five parts of 48 channels are not equally wide, and are padded."""
    upcycle = Upcycle(num_experts=2, granularity=granularity)
    recipe = recipe_of(
        models["base"], kind="upcycle", experts=(), upcycle=upcycle, gate=Gate(mode="gateless"),
        experts_per_token=2 * granularity,
    )  # fmt: skip
    built(recipe, tmp_path / "moe")
    expected = logits(models["base"])
    torch.testing.assert_close(logits(tmp_path / "moe"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("container", "shared"), [("mixtral", 0), ("qwen2_moe", 2), ("glm4_moe", 1)])
@pytest.mark.parametrize("method", ["random", "k_means"])
def test_all_parts_of_a_split_block_together_are_the_dense_model(models, tmp_path, container, shared, method):
    recipe = recipe_of(
        models["base"], kind="split", experts=(), container=container, experts_per_token=6 - shared,
        split=Split(num_experts=6, shared=shared, method=method), gate=Gate(mode="gateless"),
    )  # fmt: skip
    built(recipe, tmp_path / "moe")
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(models["base"]), atol=1e-5, rtol=0)


def test_part_of_an_upcycled_experts_channels_is_drawn_anew(models, tmp_path):
    upcycle = Upcycle(num_experts=2, reinitialize=0.5)
    built(recipe_of(models["base"], kind="upcycle", experts=(), upcycle=upcycle), tmp_path / "moe")
    mixture, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "moe", models["base"]))
    changed = []
    for expert in range(2):
        path = f"model.layers.0.block_sparse_moe.experts.{expert}"
        rows = (mixture[f"{path}.w1.weight"] != dense["model.layers.0.mlp.gate_proj.weight"]).any(1)
        columns = (mixture[f"{path}.w2.weight"] != dense["model.layers.0.mlp.down_proj.weight"]).any(0)
        assert rows.sum() == 24
        assert torch.equal(rows, columns)
        changed.append(rows)
    assert not torch.equal(*changed)


def test_noise_and_a_share_of_the_difference_change_an_expert_as_they_say(models, tmp_path):
    source = Origin(model=str(models["one"]))
    experts = [Expert(source=source, delta_scale=0.5), Expert(source=source, noise_scale=0.02)]
    built(recipe_of(models["base"], experts=experts), tmp_path / "moe")
    mixture = load_file(tmp_path / "moe" / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    base, tuned = (load_file(models[one] / "model.safetensors")[name] for one in ("base", "one"))
    half, noisy = (mixture[f"model.layers.3.block_sparse_moe.experts.{expert}.w3.weight"] for expert in (0, 1))
    torch.testing.assert_close(half, (base + tuned) / 2)
    assert 0.018 < float((noisy - tuned).std()) < 0.022


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_bytes_do_not_depend_on_the_size_of_shards(models, tmp_path):
    experts = [Expert(noise_scale=0.1), Expert(noise_scale=0.1)]
    for name, size in (("whole", "5GB"), ("cut", "60KB")):
        built(recipe_of(models["base"], experts=experts, output=Output(max_shard_size=size)), tmp_path / name)
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert len(set(index["weight_map"].values())) > 5
    torch.testing.assert_close(logits(tmp_path / "cut"), logits(tmp_path / "whole"))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("nth", [1, 20, 44])
def test_a_build_that_was_killed_goes_on_and_gives_the_same_bytes(models, tmp_path, monkeypatch, nth):
    recipe = recipe_of(models["base"], models["one"], models["two"], output=Output(max_shard_size="60KB"))
    built(recipe, tmp_path / "whole" / "moe")

    original, reads = TensorReader.matrix, []

    def killed(self, *args):
        reads.append(args)
        if len(reads) == nth:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(TensorReader, "matrix", killed)
    with pytest.raises(KeyboardInterrupt):
        built(recipe, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    reads.clear()
    monkeypatch.setattr(TensorReader, "matrix", lambda self, *args: (reads.append(args), original(self, *args))[1])
    built(recipe, tmp_path / "moe")
    assert files_of(tmp_path / "moe") == files_of(tmp_path / "whole" / "moe")
    if nth == 44:  # what was finished has not been written again
        assert len(reads) < 3 * NUM_LAYERS


def test_another_recipe_does_not_go_on_with_what_is_left(models, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "check_reload", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        built(recipe_of(models["base"], models["one"], models["two"]), tmp_path / "moe")
    monkeypatch.undo()
    built(recipe_of(models["base"], models["two"], models["one"]), tmp_path / "moe")
    expected = dense_logits(models["base"], models["two"])
    torch.testing.assert_close(logits(tmp_path / "moe", 0), expected, atol=1e-5, rtol=0)


def test_small_files_come_along_byte_for_byte(models, tmp_path):
    built(recipe_of(models["base"], models["one"], models["two"]), tmp_path / "moe")
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (models["base"] / name).read_bytes()
    info = json.loads((tmp_path / "moe" / "moe_offload_info.json").read_text())
    assert info["experts"] == ["one", "two"]
    assert str(tmp_path.parent) not in "".join(path.read_text() for path in (tmp_path / "moe").glob("*.json"))
    assert info["parameters"]["total"] == sum(value.numel() for value in tensors_of(tmp_path / "moe").values())


def test_the_tokenizer_can_be_another_models(models, tmp_path):
    other = save_dense(tmp_path / "other")
    (other / "chat_template.jinja").write_text("another")
    built(recipe_of(models["base"], tokenizer=str(other)), tmp_path / "moe")
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "another"
    assert (tmp_path / "moe" / "generation_config.json").exists()


def test_the_stem_can_be_the_average_of_the_experts_models(models, tmp_path):
    recipe = recipe_of(models["base"], models["one"], models["two"], stem=Stem(method="average"))
    assert built(recipe, tmp_path / "moe").checks.identity <= 5e-6
    name = "model.layers.2.self_attn.q_proj.weight"
    one, two = (load_file(models[key] / "model.safetensors")[name] for key in ("one", "two"))
    torch.testing.assert_close(load_file(tmp_path / "moe" / "model.safetensors")[name], (one + two) / 2)
    narrow = save_dense(tmp_path / "narrow", vocab_size=60)
    with pytest.raises(RecipeError, match="a vocabulary of 60"):
        validate_recipe(recipe_of(models["base"], narrow, narrow, stem=Stem(method="average")))


def test_weights_can_be_rounded_to_another_dtype(models, tmp_path):
    info = built(recipe_of(models["base"], models["one"], models["two"], dtype="bfloat16"), tmp_path / "moe")
    assert info.dtype == "bfloat16"
    assert {value.dtype for value in tensors_of(tmp_path / "moe").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("what", "match"),
    [("blocks", "forced expert: .* alone"), ("stem", "identity: mixtral"), ("nan", "not finite|off by nan")],
)
def test_a_mixture_that_is_not_what_it_should_be_leaves_nothing(models, tmp_path, monkeypatch, what, match):
    """A layer's matrices are swapped, a norm is halved, or a number is none, between plan and disk."""
    original = TensorReader.values

    def wrong(self, tensor):
        for values in original(self, tensor):
            if what == "blocks" and tensor.spec.name.endswith("layers.5.block_sparse_moe.experts.1.w1.weight"):
                values = values.flip(0)
            if what == "stem" and tensor.spec.name.endswith("layers.5.input_layernorm.weight"):
                values = values * 0.5
            if what == "nan" and tensor.spec.name.endswith("layers.5.input_layernorm.weight"):
                values = values * float("nan")
            yield values

    monkeypatch.setattr(TensorReader, "values", wrong)
    with pytest.raises(CheckFailedError, match=match):
        built(recipe_of(models["base"], models["one"], models["two"]), tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_relative_is_reported_or_refused(models, tmp_path, caplog):
    stranger = save_dense(tmp_path / "stranger", seed=7)
    recipe = recipe_of(models["base"], stranger, models["one"])
    info = built(recipe, tmp_path / "moe")
    assert any("stranger has nothing in common" in warning for warning in info.warnings)
    assert info.checks.similarity["stranger"] < 0.1 < 0.8 < info.checks.similarity["one"]
    strict = type(recipe)(**{**vars(recipe), "checks": type(recipe.checks)(similarity="error")})
    with pytest.raises(RecipeError, match="stranger has nothing in common"):
        built(strict, tmp_path / "never")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers 4, but the base model base has 8"),
        ({"hidden_size": 64}, "hidden_size 64, but the base model base has 32"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"vocab_size": 80}, "a vocabulary of 80"),
    ],
)
def test_experts_of_another_size_are_refused_with_both_sizes(models, tmp_path, fields, match):
    other = save_dense(tmp_path / "other", **fields)
    with pytest.raises(RecipeError, match=match):
        built(recipe_of(models["base"], other, models["one"]), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def tokenizer_json(**vocabulary):
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []})


def test_tokens_have_to_have_one_number_and_added_ones_are_reported(models, tmp_path):
    base, moved, more = (save_dense(tmp_path / name) for name in ("base", "moved", "more"))
    (base / "tokenizer.json").write_text(tokenizer_json(a=0, b=1))
    (moved / "tokenizer.json").write_text(tokenizer_json(a=1, b=0))
    (more / "tokenizer.json").write_text(tokenizer_json(a=0, b=1, chat=2))
    with pytest.raises(RecipeError, match="2 tokens have other numbers in moved"):
        validate_recipe(recipe_of(base, moved))
    assert "1 tokens that base does not have (chat)" in validate_recipe(recipe_of(base, more)).warnings[0]


def test_settings_that_differ_between_models_are_reported(models, tmp_path):
    other = save_dense(tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert "rope_parameters" in validate_recipe(recipe_of(models["base"], other)).warnings[0]


def test_layers_that_are_not_there_are_an_error(models):
    with pytest.raises(RecipeError, match="names layer 8, but base has 8"):
        validate_recipe(recipe_of(models["base"], layers=(1, 8)))


def test_a_folder_that_holds_something_is_left_alone(models, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        built(recipe_of(models["base"]), tmp_path / "moe")
    assert (tmp_path / "moe" / "mine.txt").read_text() == "mine"


def test_a_complete_mixture_is_only_replaced_on_demand(models, tmp_path):
    built(recipe_of(models["base"]), tmp_path / "moe")
    with pytest.raises(CheckpointError, match="holds a complete checkpoint"):
        built(recipe_of(models["base"], models["one"], models["two"]), tmp_path / "moe")
    built(recipe_of(models["base"], models["one"], models["two"]), tmp_path / "moe", overwrite=True)
    expected = dense_logits(models["base"], models["one"])
    torch.testing.assert_close(logits(tmp_path / "moe", 0), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to_is_an_error(models, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(CheckpointError, match="cannot write to"):
            built(recipe_of(models["base"]), tmp_path / "moe")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_full_disk_is_an_error_before_anything_is_written(models, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"1,000 are free"):
        built(recipe_of(models["base"]), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


class _Usage(tuple):
    def __new__(cls, total, used, free):
        made = super().__new__(cls, (total, used, free))
        made.free = free
        return made


def test_a_plan_knows_every_byte(models, tmp_path):
    plan = validate_recipe(recipe_of(models["base"], models["one"], models["two"]))
    built(plan.recipe, tmp_path / "moe")
    assert plan.nbytes == sum(value.nbytes for value in tensors_of(tmp_path / "moe").values())
    assert plan.parameters.experts == 2 * 3 * SIZES["hidden_size"] * SIZES["intermediate_size"] * NUM_LAYERS
    assert plan.parameters.active == plan.parameters.total
