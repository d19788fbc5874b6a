"""Probes choose what the routers of every architecture choose, and look ahead through each one's own norms.

Upstream's next architecture fails here by name if its router cannot be reproduced.
"""

# T tokens, K experts per token, E experts, H hidden

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.hf.layouts import ExpertsLayout
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.routers.probe import GroupLimit, RouterProbe, find_probe
from zoo.build import build, failure_of_stock, inputs, zoo_names

WITHOUT_PROBE = {
    "deepseek_v4": ("layers.0.", "layers.1.", "hash layers choose by token id"),
    "jetmoe": ("output_linear", "self_attention", "second halves of a pair; a mixture of attention has no forward"),
    "llama4": ("", "experts get rows that are already scaled, not tokens"),
    "llama4_text": ("", "the same"),
    "muse_spark": ("", "the router is before a norm, the experts after it"),
    "nllb_moe": ("", "its forward takes values of a mask for choices, and runs the experts 0 and 1"),
    "zaya": ("", "the router is an MLP with a state that passes from layer to layer"),
}
"""Parts of the paths of sparse layers whose router cannot be reproduced, and the reason."""

WITHOUT_NORM = {
    "axk2": "the norm is gated by its input",
    "flex_olmo": "outputs are normed, not inputs",
    "qwen4_exp": "several residual streams are mixed before the layer",
}
"""Architectures whose norm before the experts is not a weight alone, and the reason."""


class Found(NamedTuple):
    """A model of the zoo, and the probe of each of its sparse layers."""

    name: str
    model: nn.Module
    layouts: dict[str, ExpertsLayout]
    probes: dict[str, RouterProbe | None]


@pytest.fixture(scope="module", params=zoo_names())
def found(request):
    if failure_of_stock(request.param) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(request.param)!r}")
    model = build(request.param)
    layouts = {path: layout for path, _, layout in find_experts(model)}
    return Found(request.param, model, layouts, {path: find_probe(model, path) for path in layouts})


def test_a_probe_ranks_first_exactly_the_experts_that_its_layer_chose(found):
    name, model, layouts, probes = found
    *parts, _ = WITHOUT_PROBE.get(name, ("",))
    without = {path for path in layouts if any(part in path for part in parts)}
    assert {path for path, probe in probes.items() if probe is None} == without

    with recorded_inputs(model, set(probes) - without) as recorded, torch.no_grad():
        model(**inputs(name, model))
    for path, calls in recorded.items():
        assert calls, f"{path} is never called"
        for hidden, *rest in calls:
            scores = probes[path].scores(hidden.flatten(0, -2))
            ranking = scores.argsort(descending=True).tolist()
            for ranked, chosen in zip(ranking, choices(layouts[path], scores.shape[-1], hidden, *rest), strict=True):
                assert set(ranked[: len(chosen)]) == set(chosen), path


def test_the_norm_of_a_probe_is_the_one_whose_output_reaches_the_experts(found):
    normed = {path: probe.norm for path, probe in found.probes.items() if probe is not None and probe.is_normed}
    probed = {path for path, probe in found.probes.items() if probe is not None}
    assert set(normed) == (probed if found.name not in WITHOUT_NORM else set())

    outputs: dict[str, set[tuple[float, ...]]] = {path: set() for path in normed}
    hooks = [
        norm.module.register_forward_hook(lambda _, __, out, path=path: outputs[path].update(rows(out)))
        for path, norm in normed.items()
    ]
    with recorded_inputs(found.model, set(normed)) as recorded, torch.no_grad():
        found.model(**inputs(found.name, found.model))
    for hook in hooks:
        hook.remove()
    for path, calls in recorded.items():
        assert calls, f"{path} is never called"
        assert all(set(rows(hidden)) <= outputs[path] for hidden, *_ in calls), path


def test_a_residual_that_stays_the_same_is_routed_by_each_layer_as_its_own_norm_and_router_would(found):
    normed = [probe for probe in found.probes.values() if probe is not None and probe.norm is not None]
    for here in normed:
        residual = torch.randn(5, here.weight().shape[-1], generator=torch.Generator().manual_seed(1))
        for ahead in normed:
            if ahead.weight().shape[-1] == here.weight().shape[-1]:
                with torch.no_grad():
                    guessed = ahead.scores_of_residual(here.residual(here.norm.module(residual)))
                    there = ahead.scores(ahead.norm.module(residual))
                torch.testing.assert_close(guessed, there, atol=1e-4, rtol=1e-4)


def test_a_norm_that_silences_a_channel_leaves_it_silent(plain):
    probe = find_probe(plain, EXPERTS)
    weight = probe.norm.weight
    kept = weight.detach().clone()
    hidden = torch.randn(3, weight.shape[0]) * kept
    with torch.no_grad():
        weight[0] = 0
        hidden[:, 0] = 0
        residual = probe.residual(hidden)
        weight.copy_(kept)
    assert torch.isfinite(residual).all()
    assert (residual[:, 0] == 0).all()


EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def own_model(checkpoint):
    """A model to change at will."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")


@pytest.fixture
def hidden(plain):
    return torch.randn(3, plain.config.hidden_size, generator=torch.Generator().manual_seed(0))


def test_a_probe_follows_its_model_into_another_dtype(own_model, hidden):
    probe = find_probe(own_model, EXPERTS)
    before = probe.scores(hidden)
    own_model.to(torch.bfloat16)
    after = probe.scores(hidden)
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before, atol=0.1, rtol=0.1)


def test_a_probe_computes_in_the_routers_dtype(own_model, hidden):
    probe = find_probe(own_model, EXPERTS)
    own_model.get_submodule(EXPERTS.replace("experts", "gate")).double()
    assert probe.scores(hidden.bfloat16()).dtype == torch.float64


def test_a_probe_sees_weights_that_are_replaced(own_model, hidden):
    probe = find_probe(own_model, EXPERTS)
    router = own_model.get_submodule(EXPERTS.replace("experts", "gate"))
    router.weight = nn.Parameter(torch.zeros_like(router.weight))
    assert (probe.scores(hidden) == 0).all()


def test_a_copy_of_a_model_and_its_probes_stands_on_its_own(own_model, hidden):
    probe = find_probe(own_model, EXPERTS)
    twin, routers = copy.deepcopy((own_model, {1: probe.scores_of_residual}))
    before = probe.scores_of_residual(hidden)
    with torch.no_grad():
        probe.weight().zero_()
    assert torch.equal(routers[1](hidden), before)
    with torch.no_grad():
        twin.get_submodule(EXPERTS.replace("experts", "gate")).weight.zero_()
    assert (routers[1](hidden) == 0).all()


def test_an_offloaded_model_has_the_probes_of_the_plain_one(checkpoint, plain, hidden):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(cache_budget="50%"))
    before = model.moe_offload.stats()
    for path, _, _ in find_experts(plain):
        found, expected = find_probe(model, path), find_probe(plain, path)
        assert torch.equal(found.scores(hidden), expected.scores(hidden))
        assert torch.equal(found.residual(hidden), expected.residual(hidden))
    assert model.moe_offload.stats() == before, "looking for routers fetched experts"


def test_looking_for_a_router_leaves_no_hooks_behind(own_model):
    experts = own_model.get_submodule(EXPERTS)
    find_probe(own_model, EXPERTS)
    assert not experts._forward_pre_hooks


def test_a_router_that_chooses_otherwise_than_its_scores_say_is_not_offered(own_model):
    router = own_model.get_submodule(EXPERTS.replace("experts", "gate"))
    forward = router.forward

    def contrary(hidden_states):
        logits, weights, index = forward(hidden_states)
        return logits, weights, logits.shape[-1] - 1 - index

    router.forward = contrary
    assert find_probe(own_model, EXPERTS) is None


def test_a_router_whose_weights_are_elsewhere_is_not_offered(own_model):
    own_model.get_submodule(EXPERTS.replace("experts", "gate")).to("meta")
    assert find_probe(own_model, EXPERTS) is None


def test_only_experts_of_the_best_groups_are_in_question():
    scores = torch.tensor([[9.0, 0.0, 5.0, 6.0, 7.0, 1.0]])
    best_two_counted = GroupLimit(num_groups=3, num_kept=1, num_counted=2).apply(scores)
    best_one_counted = GroupLimit(num_groups=3, num_kept=1, num_counted=1).apply(scores)
    assert torch.isfinite(best_two_counted).tolist() == [[False, False, True, True, False, False]]
    assert torch.isfinite(best_one_counted).tolist() == [[True, True, False, False, False, False]]


@contextmanager
def recorded_inputs(model: nn.Module, paths: set[str]) -> Iterator[dict[str, list[tuple]]]:
    """The arguments of all calls of some experts modules, by path."""
    recorded: dict[str, list[tuple]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: recorded[path].append((*args, *kwargs.values())), with_kwargs=True
        )
        for path in paths
    ]
    yield recorded
    for hook in hooks:
        hook.remove()


def choices(layout, num_experts: int, hidden: torch.Tensor, *rest) -> list[list[int]]:
    """The experts that each row of the experts' inputs goes to."""
    if not isinstance(rest[0], torch.Tensor):  # rows are sorted by expert already, and their numbers given
        token_rows, experts = rows(hidden), [expert for expert, count in enumerate(rest[0]) for _ in range(count)]
        return [[e for row, e in zip(token_rows, experts, strict=True) if row == own] for own in token_rows]
    if hidden.dim() > 2:
        hidden, *rest = (tensor.flatten(0, -2) for tensor in (hidden, *rest))
    by_token = zip(hidden.split(1), *(tensor.split(1) for tensor in rest), strict=True)
    return [layout.wanted(num_experts, *token) for token in by_token]


def rows(hidden: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in hidden.flatten(0, -2).tolist()]
