"""Routers of every architecture of the installed Transformers prefer residents as the architecture demands."""

# T tokens, K experts per token, E experts

from dataclasses import replace

import pytest
import torch

from transformers_moe_offload import OffloadConfig, routing
from transformers_moe_offload.routing.router_hook import Decision
from transformers_moe_offload.routing.sites import find_sites
from transformers_moe_offload.routing.strategies import CacheAware
from transformers_moe_offload.routing.switching import observe, stop_observing
from zoo.build import build, failure_of_stock, inputs, load, output_tensor, save, zoo_names

from .test_conformance import NOTHING_TO_SWAP, WEIGHTS_OF_A_SET, check_weights

BY_TOKEN_ID = {"deepseek_v4"}
"""Some of their layers look experts up in a table."""


class Everywhere(CacheAware):
    """Takes every forward for a step of decoding, and notes what it was asked and has chosen."""

    def choose(self, call):
        call = replace(call, is_step=True)
        choice = super().choose(call)
        notes.append((call, choice))
        return choice


notes = []


@pytest.fixture(params=[name for name in zoo_names() if name not in NOTHING_TO_SWAP])
def name(request):
    if failure_of_stock(request.param) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(request.param)!r}")
    return request.param


@pytest.fixture
def model(name, tmp_path):
    plain = build(name)
    save(plain, tmp_path, "fused")
    config = OffloadConfig(cache_budget="40%", arithmetic="exact", mmap=False)
    return load(plain, tmp_path, moe_offload=config).eval()


@torch.no_grad()
def run(name, model):
    """The decisions of a forward, by router."""
    found: dict[int, list[Decision]] = {}

    def note(layer, decision):
        found.setdefault(layer, []).append(decision)

    observe(model, find_sites(model), note)
    output = output_tensor(model(**inputs(name, model)))
    stop_observing(model, note)
    assert torch.isfinite(output).all()
    return output, found


def test_residents_are_preferred_and_all_else_is_the_architectures_own(name, model):
    expected, own = run(name, model)
    protect = min(1, *(decision.experts.shape[1] - 1 for decisions in own.values() for decision in decisions))
    with routing.set_routing(model, "cache_aware", strength=0):
        assert torch.equal(run(name, model)[0], expected)
    with routing.set_routing(model, "cache_aware", strength=1.0, protect=protect):
        assert torch.equal(run(name, model)[0], expected), "this is a prompt"
    notes.clear()
    with routing.set_routing(model, Everywhere(strength=0.5, protect=protect)):
        _, swapped = run(name, model)
    assert torch.equal(run(name, model)[0], expected)
    check_choices(name, protect)
    for layer, decisions in swapped.items():
        for decision, before in zip(decisions, own[layer], strict=True):
            assert decision.experts.shape == before.experts.shape
            if name not in WEIGHTS_OF_A_SET:
                check_weights(decision, before)


def check_choices(name, protect):
    """At least as many residents as the router would have taken, and more somewhere; the best one always."""
    gained, num_left_alone = 0, 0
    for call, choice in notes:
        if choice is None:
            assert call.resident is None or not call.is_ranked
            num_left_alone += not call.is_ranked
            continue
        num_others = call.num_experts - len(call.resident)
        resident = torch.nn.functional.pad(call.resident, (0, num_others), value=True)
        own, ours = call.scores.topk(call.top_k).indices, choice.experts
        assert all(len(set(row)) == call.top_k for row in ours.tolist()), "an expert twice"
        assert (call.scores.gather(1, ours).isneginf().sum(-1) <= call.scores.gather(1, own).isneginf().sum(-1)).all()
        more = resident[ours].sum(-1) - resident[own].sum(-1)
        assert (more >= 0).all()
        gained += int(more.sum())
        if protect:
            assert (own[:, :1] == ours).any(-1).all()
    assert gained, "no resident was ever preferred"
    assert bool(num_left_alone) == (name in BY_TOKEN_ID)
