"""The zoo keeps its promises: every architecture is in it, runs, routes, and survives a plain save and load.

None of this involves the plugin. A test that later compares the plugin with a model of the zoo may take for granted
that the model is deterministic, that all its experts modules matter, and that stock loading is exact.
"""

# T tokens, K experts per token

import pytest
import torch
import transformers
from torch import Tensor, nn

from zoo.build import build, failure_of_stock, inputs, load, output_tensor, save, zoo_model, zoo_names
from zoo.catalogue import INPUTS, OVERRIDES, SINCE, VARIANTS
from zoo.inventory import NOT_TOKEN_ROUTED, moe_model_dirs


@pytest.fixture(scope="module", params=zoo_names())
def name(request):
    if failure_of_stock(request.param) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(request.param)!r}")
    return request.param


def test_every_token_routed_directory_of_transformers_has_a_model():
    """Names the newcomer when upstream adds one that the generic rules cannot configure."""
    covered = {zoo_model(name).directory for name in zoo_names()}
    assert covered == set(moe_model_dirs()) - set(NOT_TOKEN_ROUTED)


def test_nothing_in_the_catalogue_is_left_over_from_an_architecture_that_is_gone():
    installed = [int(part) for part in transformers.__version__.split(".")[:2]]
    to_come = {name for name, since in SINCE.items() if installed < [int(part) for part in since.split(".")]}
    assert not to_come & set(zoo_names())
    assert {*VARIANTS, *INPUTS, *OVERRIDES, *SINCE} <= {*zoo_names(), *to_come}
    assert set(NOT_TOKEN_ROUTED) <= set(moe_model_dirs())


def test_an_architecture_that_fails_in_transformers_itself_does_so_in_one_class_at_most():
    """Should a release break more than one of the eighty, it is the zoo that is broken."""
    assert len([name for name in zoo_names() if failure_of_stock(name)]) <= 1


def test_the_inventory_finds_experts_in_all_their_shapes():
    found = moe_model_dirs()
    assert found["mixtral"].decorated == ("MixtralExperts",)
    assert found["dbrx"].undecorated == ("DbrxExperts",), "experts that keep their weights in a child"
    assert found["switch_transformers"].undecorated == ("SwitchTransformersExperts",), "a ModuleDict of experts"
    assert found["jetmoe"].undecorated[0] == "JetMoeParallelExperts", "experts in the attention"
    if "sarvam_moe" in found:
        assert found["sarvam_moe"].defined_in == "glm4_moe", "a config for the classes of another architecture"
    assert len(found) >= 73, "Transformers 5.23.0 has 73; fewer means that the evidence no longer fits the sources"
    assert "llama" not in found
    assert "bamba" not in found, "mentions num_experts, has none"


def test_a_forward_uses_more_experts_than_one_token_does_and_every_experts_module_reaches_the_output(name):
    model = build(name)
    experts = experts_modules(name, model)
    assert len(experts) >= 2, "too few sparse layers"
    used = {path: [] for path in experts_modules(name, model, decorated_only=True)}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(note_indices(used[path]), with_kwargs=True) for path in used
    ]
    expected = run(name, model)
    assert torch.isfinite(expected).all()
    for path, indices in used.items():
        assert len(indices) > 0, f"{path} is never called"
        assert all(len(index.unique()) > index.shape[-1] for index in indices), path
    for hook in hooks:
        hook.remove()
    for path, module in experts.items():
        weights = {key: weight.clone() for key, weight in module.state_dict().items()}
        module.load_state_dict({key: torch.zeros_like(weight) for key, weight in weights.items()})
        assert not torch.equal(expected, run(name, model)), f"{path} could be anything"
        module.load_state_dict(weights)
    assert torch.equal(expected, run(name, model)), "not repeated to the bit"


def test_a_seed_decides_what_is_built():
    first, again, other = (build("mixtral", seed=seed).state_dict() for seed in (0, 0, 1))
    assert differing(first, again) == []
    assert differing(first, other)


def test_stock_transformers_round_trips_bit_for_bit(name, tmp_path):
    """In the dtype in which models keep some tensors in float32, and the layout that has to be converted."""
    model = build(name, torch.bfloat16)
    save(model, tmp_path, "per-expert")
    loaded, report = load(
        model, tmp_path, dtype=torch.bfloat16, experts_implementation="eager", output_loading_info=True
    )
    assert {kind: keys for kind, keys in report.items() if keys} == {}
    assert differing(model.state_dict(), loaded.state_dict()) == []
    # What is loaded lies where the file has it. Some processors' kernels sum in another order off a cache line.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(run(name, model), run(name, loaded))


def test_the_looping_model_of_the_zoo_does_loop():
    """What tests of ours take it for: experts modules that run three times in a forward, between others that do not."""
    if "inkling2_loop" not in zoo_names():
        pytest.skip("this version of Transformers has no model with loops")
    model = build("inkling2_loop")
    calls = []
    for number, module in enumerate(experts_modules("inkling2_loop", model).values()):
        module.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    run("inkling2_loop", model)
    assert calls == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]


def test_loading_still_overwrites_the_skip_bias_of_zaya(tmp_path):
    """What `zoo.weights` works around. Should this fail, upstream has mended it and `ZAYA_BIAS` can go."""
    model = build("zaya")
    model.model.layers[0].mlp.gate.balancing_biases[-1] = -0.5
    save(model, tmp_path, "fused")
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.gate.balancing_biases[-1] == -1


def run(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output_tensor(model(**inputs(name, model)))


def experts_modules(name: str, model: nn.Module, *, decorated_only: bool = False) -> dict[str, nn.Module]:
    """The modules of the classes which the inventory takes for experts, decorated or not, by path."""
    evidence = moe_model_dirs()[zoo_model(name).directory]
    classes = {*evidence.decorated, *(() if decorated_only else evidence.undecorated)}
    return {path: module for path, module in model.named_modules() if type(module).__name__ in classes}


def note_indices(indices: list[Tensor]):
    """A forward pre-hook for experts modules, forward(hidden_states, top_k_index (T, K), top_k_weights)."""

    def note(module, args, kwargs):
        indices.append(kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

    return note


def differing(expected: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in presence, dtype or any bit."""
    return [
        key
        for key in sorted({*expected, *got})
        if key not in expected
        or key not in got
        or expected[key].dtype != got[key].dtype
        or not torch.equal(expected[key], got[key])
    ]
