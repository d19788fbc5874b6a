"""A recipe for a mixture of adapters becomes a folder that loads, whose adapters are the files they were."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.mixtures import dense_model, logits, saved, write_adapter, write_three
from programs import TORCH, run_program
from transformers_moe_offload import CheckpointError, OffloadConfig, RecipeError
from transformers_moe_offload.builder import MoeRecipe, build_moe, validate_recipe
from transformers_moe_offload.builder.adapters.build import build_adapter_moe
from transformers_moe_offload.builder.recipe import AdapterRouting, Dataset, Expert, Gate, Origin

MODELS = Path(__file__).parents[3] / "examples" / "models"
TEXTS = {
    "c": ["#include <stdio.h>\nint main(void)\n{\n    return printf(\"%d\", 1);\n}",
          "static int f(char *p) { return *p; }"],
    "prose": ["The library is installed by default, and there is more about it in the chapter on modules.",
              "For more information, see the section that describes what is new in this version."],
    "python": ["def f(self, x):\n    return [y for y in x]",
               "import os\nclass A:\n    def __init__(self):\n        pass"],
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return saved(dense_model(), tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    return write_three(tmp_path_factory.mktemp("adapters"))


def recipe(dense: Path, adapters: list[Path], **options) -> MoeRecipe:
    experts = tuple(Expert(source=Origin(adapter=str(folder))) for folder in adapters)
    options = {"gate": Gate(mode="random"), "experts_per_token": 2} | options
    return MoeRecipe(kind="adapter_moe", base_model=Origin(model=str(dense)), experts=experts, **options)


@pytest.mark.parametrize("router_per", ["ffn", "linear", "model"])
@pytest.mark.parametrize("scoring", ["softmax", "arrow", "uniform"])
def test_what_is_built_loads_and_each_adapter_alone_is_the_merged_model(router_per, scoring, dense, adapters, tmp_path):
    routing = AdapterRouting(router_per=router_per, scoring=scoring)
    info = build_adapter_moe(recipe(dense, adapters, adapter_moe=routing), tmp_path / "mixture")
    assert info.forced_expert < 1e-5
    assert info.adapters == ("wide", "narrow", "all")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert model.config.num_experts_per_tok == (3 if scoring == "uniform" else 2)
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", moe_offload=OffloadConfig())
    assert torch.equal(logits(offloaded), logits(model))


def test_the_config_says_the_dtype_of_what_is_stored(dense, adapters, tmp_path):
    build_adapter_moe(replace(recipe(dense, adapters), dtype="bfloat16"), tmp_path / "mixture")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", moe_offload=OffloadConfig())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == model.config.get_text_config().dtype == torch.bfloat16


def test_names_on_disk_are_those_that_save_pretrained_writes(dense, adapters, tmp_path):
    build_adapter_moe(recipe(dense, adapters, adapter_moe=AdapterRouting(router_per="linear")), tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    saved(model, tmp_path / "b")
    names = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            names.append(set(tensors.keys()))
    assert names[0] == names[1]


def test_adapters_are_copied_byte_for_byte(dense, adapters, tmp_path):
    build_adapter_moe(recipe(dense, adapters), tmp_path / "mixture")
    for folder in adapters:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "mixture" / "adapters" / folder.name / file).read_bytes() == (folder / file).read_bytes()


def test_arrow_routes_as_peft_does(dense, tmp_path):
    # Of rank 1, so that the power iteration of PEFT has converged.
    folders = [write_adapter(tmp_path / name, seed, rank=1) for seed, name in enumerate(("a", "b", "c"))]
    routing = AdapterRouting(router_per="linear", scoring="arrow", temperature=0.5)
    build_adapter_moe(recipe(dense, folders, adapter_moe=routing), tmp_path / "mixture")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    config = ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=0)
    theirs = create_arrow_model(dense_model(), [str(folder) for folder in folders], config).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


# Embeddings tell less than what layers make of them; by chance a third would be right.
@pytest.mark.parametrize(("router_per", "share"), [("ffn", 0.6), ("model", 0.5)])
def test_programmed_routers_send_text_to_the_adapter_that_was_trained_on_its_kind(router_per, share, tmp_path):
    experts = tuple(
        Expert(name=name, source=Origin(adapter=str(MODELS / f"tiny-dense-{name}")), positive_prompts=tuple(texts))
        for name, texts in TEXTS.items()
    )
    given = MoeRecipe(
        kind="adapter_moe", base_model=Origin(model=str(MODELS / "tiny-dense")), experts=experts, experts_per_token=1,
        adapter_moe=AdapterRouting(router_per=router_per), gate=Gate(mode="ridge"),
    )  # fmt: skip
    info = build_adapter_moe(given, tmp_path / "mixture")
    assert info.gates.experts == ("c", "prose", "python")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mixture")
    chosen = {}
    routers = {name: one for name, one in model.named_modules() if type(one).__name__ == "AdapterRouter"}
    for number, text in enumerate(("for (i = 0; i < n; i++) { p->x = malloc(4); }",
                                   "This chapter describes the modules that are installed with the library.",
                                   "for x in self.items():\n        yield x.name")):  # fmt: skip
        hooks = [
            one.register_forward_hook(lambda module, _, out, name=name: chosen.setdefault(name, []).append(out[2]))
            for name, one in routers.items()
        ]
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        shares = [(found[number] == number).float().mean().item() for found in chosen.values()]
        assert max(shares) > share


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": (Expert(),)}, "experts.0: kind: adapter_moe mixes adapters of the base model"),
        ({"experts": (Expert(source=Origin(model="x", adapter="y")),)}, "set source to {adapter: folder or id}"),
        ({"container": "mixtral"}, "kind: adapter_moe has no container"),
        ({"layers": (0,)}, "kind: adapter_moe has no layers"),
    ],
)
def test_what_adapters_cannot_be_mixed_with_is_refused(change, message, dense, adapters, tmp_path):
    with pytest.raises(RecipeError, match=message):
        build_adapter_moe(replace(recipe(dense, adapters, experts_per_token=1), **change), tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()


def test_noise_on_adapters_is_refused(dense, adapters, tmp_path):
    given = recipe(dense, adapters)
    noisy = replace(given, experts=(replace(given.experts[0], noise_scale=0.1), *given.experts[1:]))
    with pytest.raises(RecipeError, match=r"experts\.0: noise_scale=0\.1 changes weights"):
        build_adapter_moe(noisy, tmp_path / "mixture")


def test_two_adapters_of_one_name_are_refused(dense, adapters, tmp_path):
    with pytest.raises(RecipeError, match="two adapters are called 'wide'"):
        build_adapter_moe(recipe(dense, [adapters[0], adapters[0]]), tmp_path / "mixture")


def test_gates_that_have_rows_of_another_width_than_a_router_are_refused(tmp_path):
    experts = tuple(
        Expert(name=name, source=Origin(adapter=str(MODELS / f"tiny-dense-{name}")), positive_prompts=tuple(texts))
        for name, texts in TEXTS.items()
    )
    given = MoeRecipe(
        kind="adapter_moe", base_model=Origin(model=str(MODELS / "tiny-dense")), experts=experts,
        adapter_moe=AdapterRouting(router_per="linear"), gate=Gate(mode="cheap_embed"),
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"gives rows of 192, but .*down_proj reads 512 values"):
        build_adapter_moe(given, tmp_path / "mixture")


def test_a_mixture_that_is_there_is_not_overwritten_unasked(dense, adapters, tmp_path):
    given = recipe(dense, adapters, adapter_moe=AdapterRouting(scoring="uniform"))
    build_adapter_moe(given, tmp_path / "mixture")
    with pytest.raises(Exception, match="holds a complete checkpoint"):
        build_adapter_moe(given, tmp_path / "mixture")
    build_adapter_moe(given, tmp_path / "mixture", overwrite=True)


@pytest.mark.parametrize("is_changed", [False, True], ids=["same text", "another text"])
def test_an_interrupted_build_goes_on_unless_its_text_has_changed(is_changed, tmp_path, monkeypatch):
    def given():
        experts = tuple(
            Expert(
                name=name, source=Origin(adapter=str(MODELS / f"tiny-dense-{name}")),
                dataset=Dataset(path=str(tmp_path / f"{name}.txt")),
            )
            for name in ("c", "python")
        )  # fmt: skip
        base, routing = Origin(model=str(MODELS / "tiny-dense")), AdapterRouting()
        return MoeRecipe(kind="adapter_moe", base_model=base, experts=experts, adapter_moe=routing)

    def interrupted(*args):
        raise KeyboardInterrupt

    for name in ("c", "python"):
        (tmp_path / f"{name}.txt").write_text("\n".join(TEXTS[name]))
    with monkeypatch.context() as patch:
        patch.setattr("transformers_moe_offload.builder.adapters.build.write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_adapter_moe(given(), tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()
    weights = tmp_path / ".mixture.new" / "model.safetensors"
    left = weights.stat().st_ino, weights.read_bytes()
    if is_changed:
        (tmp_path / "c.txt").write_text("\n".join(TEXTS["prose"]))
    build_adapter_moe(given(), tmp_path / "mixture")
    build_adapter_moe(given(), tmp_path / "anew")
    weights = tmp_path / "mixture" / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "anew" / "model.safetensors").read_bytes()
    assert (weights.read_bytes() != left[1]) == is_changed
    if not is_changed:
        assert weights.stat().st_ino == left[0]


def test_texts_need_a_tokenizer_and_what_reads_none_does_not(dense, adapters, tmp_path):
    given = recipe(dense, adapters)
    experts = tuple(replace(expert, positive_prompts=("a", "b")) for expert in given.experts)
    with pytest.raises(CheckpointError, match="dense has no tokenizer to read the texts of its experts with"):
        build_adapter_moe(replace(given, experts=experts, gate=Gate(mode="ridge")), tmp_path / "mixture")
    arrow = AdapterRouting(router_per="linear", scoring="arrow")
    build_adapter_moe(replace(given, experts=experts, gate=Gate(), adapter_moe=arrow), tmp_path / "mixture")


def test_an_adapter_of_another_model_is_refused(dense, tmp_path):
    folder = write_adapter(tmp_path / "odd", 1)
    weights = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(Exception, match=r"layers\.7"):
        build_adapter_moe(recipe(dense, [folder], experts_per_token=1), tmp_path / "mixture")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    model = dense_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 0.5)
    return saved(model, tmp_path_factory.mktemp("untied") / "untied")


def with_head(untied, folder, **options) -> Path:
    """An adapter on the head as well, beside which PEFT writes the head itself."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "lm_head"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(untied), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_on_the_head_is_mixed_like_any_other(untied, tmp_path):
    folder = with_head(untied, tmp_path / "head")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert {"base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.base_layer.weight"} <= names
    info = build_adapter_moe(recipe(untied, [folder], experts_per_token=1), tmp_path / "mixture")
    assert info.forced_expert < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    with model.taking_only(0):
        ours = logits(model)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), folder)
    torch.testing.assert_close(ours, logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lm_head.base_layer", lambda weight: weight + 1),
        ("model.embed_tokens", lambda weight: weight[:, :16].contiguous()),
        ("model.layers.0.input_layernorm", lambda weight: weight[0] + 1),
    ],
)
def test_an_adapter_with_weights_of_its_own_is_refused_by_their_name(name, change, untied, tmp_path):
    folder = with_head(untied, tmp_path / "head")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{name}.weight"] = change(tensors["base_model.model.lm_head.base_layer.weight"])
    save_file(tensors, weights)
    with pytest.raises((RecipeError, CheckpointError), match=name.removesuffix(".base_layer")):
        build_adapter_moe(recipe(untied, [folder], experts_per_token=1), tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()


def test_an_adapter_with_modules_to_save_is_refused_by_that_option(untied, tmp_path):
    folder = with_head(untied, tmp_path / "head", modules_to_save=["embed_tokens"])
    with pytest.raises(RecipeError, match=r"uses modules_to_save=\['embed_tokens'\], which cannot be mixed"):
        build_adapter_moe(recipe(untied, [folder], experts_per_token=1), tmp_path / "mixture")


@pytest.mark.parametrize("build", [validate_recipe, lambda given: build_moe(given, "never")])
def test_who_builds_adapters_with_the_function_for_other_kinds_is_told_which_one_does(build, dense, adapters):
    with pytest.raises(RecipeError, match="built by build_adapter_moe"):
        build(recipe(dense, adapters))


LOADED_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["transformers_moe_offload"] = None  # importing it raises ModuleNotFoundError
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
"""


def test_what_is_built_loads_where_the_package_is_missing(dense, adapters, tmp_path):
    build_adapter_moe(recipe(dense, adapters), tmp_path / "mixture")
    command = ["python", "-c", LOADED_WITHOUT_THE_PACKAGE, tmp_path / "mixture", tmp_path / "logits.pt"]
    alone = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_program(*command, variables=alone, imported=TORCH)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")(torch.arange(8)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
