"""Strategies on every architecture of the installed Transformers: they work as the architecture demands, or are refused
by name and with the reason.

The list of architectures is enumerated, and so is that of strategies; a newcomer among either shows up here. What a
router does with a choice depends on its number of experts and on entries that only fill a row up, so two strategies
that have these go to every architecture, and all strategies to one architecture of each way to choose.
"""

# T tokens, K experts per token, E experts, H hidden

from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from torch import nn

from transformers_moe_offload import UnsupportedModelError, routing
from transformers_moe_offload.routing.router_hook import Decision
from transformers_moe_offload.routing.sites import find_sites
from transformers_moe_offload.routing.strategy import _strategies as known
from transformers_moe_offload.routing.switching import observe, stop_observing
from zoo.build import build, failure_of_stock, inputs, output_tensor, zoo_names

OWN_NUMBER = (
    "drop", "gumbel", "hash", "k_means", "linear_assignment", "noise", "random", "replay", "steer", "temperature",
)  # fmt: skip
"""Strategies that give a token as many experts as the model does."""

OTHER_NUMBER = ("expert_choice", "fixed", "top_k", "top_p")

OF_A_CACHE = ("cache_aware",)
"""Strategies for offloaded models alone: `test_cache_aware_everywhere.py`."""

FOR_ALL = ("drop", "top_p")
"""The model's own number of experts, of which some do not count; and differing numbers."""

EVERY_STRATEGY = {
    "dbrx": "the block chooses, not the router",
    "deepseek_v3": "groups of experts, and a correction that counts for the choice only",
    "deepseek_v4": "some layers choose by a table of token ids",
    "gpt_oss": "softmax after the choice",
    "jetmoe": "answers in pairs sorted by expert",
    "llama4_text": "answers with a row of scores",
    "mixtral": "softmax before the choice",
    "phimoe": "takes its experts one by one",
    "switch_transformers": "answers with a one-hot row",
    "zaya": "the router is an MLP",
}
"""Architectures for all strategies, and what they stand for."""

ONLY_ITS_OWN_NUMBER = {
    "inkling": "cuts the weights off at its own number",
    "jetmoe": "attention has as many query heads as a token has experts",
    "phimoe": "takes its experts one by one",
    "switch_transformers": "takes one expert",
    "zaya": "answers in rows of its own number",
}
"""Architectures whose routers are made for one number of experts, and the reason."""

NO_TOKEN_IDS = {
    "dots3_note": "its vision tower routes patches",
    "ernie4_5_vl_moe": "some experts see the tokens of text only, others those of images",
    "qwen3_omni_moe_talker": "it is given embeddings",
}

NO_KNOWN_TEXTS = {"switch_transformers": "what a decoder reads depends on what its encoder has read"}

NOTHING_TO_SWAP = {"nllb_moe": "its experts take a mask for indices"}

WEIGHTS_OF_A_SET = {
    "gemma4": "a factor for each expert after the sum has been made one",
    "diffusion_gemma": "the same",
    "inkling": "the shared experts have a part in the sum",
    "phimoe": "how much an expert weighs depends on which were ruled out before it",
}
"""Architectures in which weights neither have a fixed sum nor belong to token and expert alone."""


PROMOTED = 1
"""The expert that `steer` gives every token."""


class Run(NamedTuple):
    """One forward."""

    output: torch.Tensor
    decisions: dict[int, list[Decision]]


CASES = [
    (name, strategy)
    for name in zoo_names()
    if name not in NOTHING_TO_SWAP
    for strategy in (None, *OWN_NUMBER, *OTHER_NUMBER)
    if strategy in (None, *FOR_ALL) or name in EVERY_STRATEGY or (strategy == "hash" and name in NO_TOKEN_IDS)
]
"""Architectures with strategies; None for their own choice."""


def cases(*strategies):
    return pytest.mark.parametrize(
        ("name", "strategy"), [case for case in CASES if case[1] in strategies], indirect=["name"]
    )


@pytest.fixture(scope="module")
def name(request):
    if failure_of_stock(request.param) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(request.param)!r}")
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return build(name)


@pytest.fixture(scope="module")
def own(name, model):
    """What the model does by itself."""
    return run(name, model)


def test_every_strategy_is_in_this_suite():
    ours = {name for name in routing.strategy_names() if known[name].__module__.startswith(routing.__name__)}
    assert ours == {*OWN_NUMBER, *OTHER_NUMBER, *OF_A_CACHE}


def test_a_model_whose_choice_means_nothing_is_refused():
    for name in NOTHING_TO_SWAP:
        with pytest.raises(UnsupportedModelError, match="experts 0 and 1 run whatever is chosen"):
            routing.set_routing(build(name), "random")


@cases(None)
def test_the_models_own_top_k_and_a_reset_are_bit_identical(name, strategy, model, own):
    plain = forward(name, model)
    assert torch.equal(own.output, plain), "being watched changed something"
    for options in ({}, {"k": own.decisions[0][0].experts.shape[1]}):
        with routing.set_routing(model, "top_k", **options):
            assert torch.equal(forward(name, model), plain)
    routing.set_routing(model, "random")
    assert not torch.equal(forward(name, model), plain)
    routing.reset(model)
    assert torch.equal(forward(name, model), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@cases(*OWN_NUMBER, *OTHER_NUMBER)
def test_a_strategy_works_as_the_architecture_demands_or_is_refused(name, model, own, strategy):
    reason = refused(name, strategy)
    if reason is not None:
        with (
            pytest.raises(UnsupportedModelError),
            routing.set_routing(model, strategy, **options(name, strategy, model, own)),
        ):
            forward(name, model)
        assert torch.equal(forward(name, model), own.output)
        return
    with routing.set_routing(model, strategy, **options(name, strategy, model, own)):
        swapped = run(name, model, with_gradients=True)
    assert torch.isfinite(swapped.output).all()
    assert not torch.equal(swapped.output, own.output)
    assert set(swapped.decisions) == set(own.decisions)
    for layer, decisions in swapped.decisions.items():
        for decision, before in zip(decisions, own.decisions[layer], strict=True):
            check_numbers(strategy, decision, before)
            if name not in WEIGHTS_OF_A_SET:
                check_weights(decision, before, raised=PROMOTED if strategy == "steer" else None)
    for site in find_sites(model):
        gradients = [parameter.grad for parameter in site.module.parameters() if parameter.grad is not None]
        assert gradients, f"{site.path} got no gradient"
        assert all(torch.isfinite(gradient).all() for gradient in gradients), site.path
    model.zero_grad()


def refused(name: str, strategy: str) -> str | None:
    if strategy in OTHER_NUMBER:
        return ONLY_ITS_OWN_NUMBER.get(name)
    return {"hash": NO_TOKEN_IDS, "replay": NO_KNOWN_TEXTS}.get(strategy, {}).get(name)


def options(name: str, strategy: str, model: nn.Module, own: Run) -> dict:
    centroids = {
        site.index: torch.randn(site.num_experts, own.decisions[site.index][0].hidden.shape[1])
        for site in find_sites(model)
    }
    if strategy == "replay":
        with routing.set_routing(model, "random"), routing.record_routing(model) as recorder:
            forward(name, model)
        return {"trace": recorder.trace}
    return {
        "drop": {"experts": [0, 3]},
        "fixed": {"experts": [1, 3, 2]},
        "k_means": {"centroids": centroids},
        "steer": {"promote": [PROMOTED], "suppress": [0, 3]},
        "top_k": {"k": 3},
    }.get(strategy, {})


def check_numbers(strategy: str, decision: Decision, before: Decision) -> None:
    experts, top_k = decision.experts, before.experts.shape[1]
    assert experts.min() >= 0
    assert experts.max() < decision.scores.shape[1]
    assert all(len(set(row)) == len(row) for row in experts.tolist()), "an expert twice"
    if strategy in OWN_NUMBER:
        assert experts.shape[1] == top_k
    if strategy in ("fixed", "top_k"):
        assert experts.shape[1] == 3
    if strategy == "fixed":
        assert (experts == torch.tensor([1, 3, 2])).all()
    if strategy == "drop":
        assert not torch.isin(experts[decision.weights != 0], torch.tensor([0, 3])).any()
    if strategy == "steer":
        assert not torch.isin(experts[decision.weights != 0], torch.tensor([0, 3])).any()
        assert (experts == PROMOTED).any(-1)[decision.scores[:, PROMOTED] > -torch.inf].all()
    if strategy in ("linear_assignment", "expert_choice"):
        num_tokens, num_experts = decision.scores.shape
        taken = experts[decision.weights != 0]
        share = -(-num_tokens // num_experts) * top_k if strategy == "linear_assignment" else num_tokens
        assert torch.bincount(taken, minlength=num_experts).max() <= share
        assert len(taken) <= num_tokens * top_k


def check_weights(decision: Decision, before: Decision, raised: int | None = None) -> None:
    """Sums are what they were where the architecture fixes them; elsewhere a weight belongs to its token and expert."""
    own_sums = before.weights.double().sum(-1)
    routed = decision.weights.ne(0).any(-1)  # choices of experts leave some tokens out, capacities too
    if (own_sums - own_sums[0]).abs().max() < 1e-5:
        sums = decision.weights.double().sum(-1)[routed]
        torch.testing.assert_close(sums, own_sums[0].expand_as(sums), atol=1e-4, rtol=1e-4)
    elif torch.equal(decision.hidden, before.hidden):  # nothing was swapped upstream
        table = defaultdict(float)
        for row, (experts, weights) in enumerate(zip(before.experts.tolist(), before.weights.tolist(), strict=True)):
            table |= {(row, expert): weight for expert, weight in zip(experts, weights, strict=True) if weight}
        for row, (experts, weights) in enumerate(
            zip(decision.experts.tolist(), decision.weights.tolist(), strict=True)
        ):
            for expert, weight in zip(experts, weights, strict=True):
                if (row, expert) in table and weight and expert != raised:
                    assert weight == pytest.approx(table[row, expert], rel=1e-4)


def run(name: str, model: nn.Module, *, with_gradients: bool = False) -> Run:
    decisions: dict[int, list[Decision]] = defaultdict(list)

    def note(layer: int, decision: Decision) -> None:
        decisions[layer].append(decision)

    observe(model, find_sites(model), note)
    with torch.set_grad_enabled(with_gradients):
        output = output_tensor(model(**inputs(name, model)))
        if with_gradients:
            output.square().mean().backward()
    stop_observing(model, note)
    return Run(output.detach(), dict(decisions))


@torch.no_grad()
def forward(name: str, model: nn.Module) -> torch.Tensor:
    return output_tensor(model(**inputs(name, model)))
