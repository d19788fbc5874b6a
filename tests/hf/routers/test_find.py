"""The one finder of routers: by their matrix and their name, beside the experts or around them."""

import pytest
from torch import nn

from transformers_moe_offload import routing, training
from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.routers.find import find_router
from zoo.build import build

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def model():
    return build("qwen3_moe")


def rename(model, **others):
    """Give the router of layer 1 another name, and put other modules beside it."""
    block = model.model.layers[1].mlp
    router = block._modules.pop("gate")
    block.scorer = router
    for name, module in others.items():
        block.add_module(name, module)
    return router


def rename_to_linear(model):
    """The router of layer 1 with neither a name nor a class that tells it."""
    rename(model)
    rows, width = model.model.layers[1].mlp.scorer.weight.shape
    model.model.layers[1].mlp.scorer = nn.Linear(width, rows, bias=False)
    return model.model.layers[1].mlp.scorer


def test_a_router_is_found_with_its_matrix(model):
    router = find_router(model, EXPERTS)
    assert router.path == "model.layers.1.mlp.gate"
    assert router.weight() is model.model.layers[1].mlp.gate.weight
    assert router.correction is None


def test_a_correction_belongs_to_the_router():
    model = build("deepseek_v3")
    gate = model.model.layers[1].mlp.gate
    assert find_router(model, EXPERTS).correction() is gate.e_score_correction_bias


def test_a_router_of_another_name_is_told_by_its_class_or_its_matrix(model):
    class Scorer(nn.Linear):
        pass

    rename(model)
    assert find_router(model, EXPERTS).path == "model.layers.1.mlp.scorer", "its class is named so"
    old = model.model.layers[1].mlp.scorer.weight
    model.model.layers[1].mlp.scorer = Scorer(old.shape[1], old.shape[0], bias=False)
    assert find_router(model, EXPERTS).path == "model.layers.1.mlp.scorer", "by its matrix"


def test_of_two_matrices_the_one_that_is_named_so_is_the_routers(model):
    rows, width = model.model.layers[1].mlp.gate.weight.shape
    block = model.model.layers[1].mlp
    block._modules = {"mixer": nn.Linear(width, rows), **block._modules}
    assert find_router(model, EXPERTS).path == "model.layers.1.mlp.gate"


def test_a_matrix_beside_the_experts_comes_before_a_name_further_out(model):
    selector = rename_to_linear(model)
    model.router_stats = nn.Linear(2, 2)
    model.model.layers[1].gate = nn.Linear(selector.in_features, 1)
    assert find_router(model, EXPERTS).path == "model.layers.1.mlp.scorer"


def test_of_two_matrices_without_names_none_is_guessed(model):
    selector = rename_to_linear(model)
    model.model.layers[1].mlp.other = nn.Linear(selector.in_features, selector.out_features)
    assert find_router(model, EXPERTS) is None


def test_of_two_without_a_matrix_none_is_guessed_and_the_error_says_what_is_looked_for(model):
    rename(model, router_a=nn.Linear(3, 3), router_b=nn.Linear(3, 3))
    model.model.layers[1].mlp.scorer = nn.Linear(3, 3)
    assert find_router(model, EXPERTS) is None
    with pytest.raises(
        UnsupportedModelError, match=r"no router beside model\.layers\.1\.mlp\.experts; a router is recognised"
    ):
        routing.record_routing(model).__enter__()
    with pytest.raises(UnsupportedModelError, match=r"no module beside model\.layers\.1\.mlp\.experts \(and 0 more\)"):
        training.set_trainable(model, "router")


def test_one_router_around_several_layers_is_found_from_each(model):
    for layer in model.model.layers:
        layer.mlp._modules.pop("gate")
    model.model.router = nn.Linear(3, 3)
    for number in range(len(model.model.layers)):
        router = find_router(model, f"model.layers.{number}.mlp.experts")
        assert (router.path, router.weight) == ("model.router", None)
