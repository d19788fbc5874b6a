"""Compute the scores of a sparse layer's router for hidden states of an earlier layer.

`find_probe` runs the block around router and experts on random hidden states, compares the experts that it chooses with
those that the probe ranks first, and discards a probe that agrees on less than 90 %.
"""

# T tokens, E experts, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.layouts import ExpertsLayout
from transformers_moe_offload.hf.model.experts_module import experts_at
from transformers_moe_offload.hf.routers.capture import Choices, choices_of_block, choices_of_router
from transformers_moe_offload.hf.routers.find import ParameterAt, facts_of, find_router
from transformers_moe_offload.hf.routers.norms import PreNorm, find_norm, random_hidden

_TOKENS = 32

_LEAST_AGREEMENT = 0.9
"""Share of the experts chosen in the check that a probe must rank first. Of small models of all architectures of
Transformers 5.23, those whose routers we reproduce reach 1 in float32 and 0.96 in bfloat16; others stay below 0.5."""

_SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "sqrt_softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
"""Functions that architectures apply to logits before they add a correction or compare groups. All of them keep the
order of the logits, so without correction and groups each gives the same choice of experts."""


class GroupLimit(NamedTuple):
    """Experts are chosen only from the best groups of neighbours (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""

    num_groups: int
    num_kept: int
    num_counted: int
    """How many of a group's best experts are summed for its score: one in DeepSeek-V2, two since V3."""

    def apply(self, scores: Tensor) -> Tensor:
        """Minus infinity for experts of other groups: scores (T, E) -> (T, E)."""
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        strength = grouped.topk(self.num_counted).values.sum(-1)
        weakest = strength.topk(self.num_kept).values[..., -1:]
        return grouped.masked_fill((strength < weakest)[..., None], -torch.inf).flatten(-2)


@dataclass(frozen=True, eq=False)
class RouterProbe:
    """Scores of one sparse layer's experts. Holds modules, never copies of weights.

    To look ahead from layer `l`, compute the residual once and pass it to each later layer:

        residual = probes[l].residual(hidden)
        scores = [probes[m].scores_of_residual(residual) for m in targets]
    """

    weight: ParameterAt
    num_experts: int
    bias: ParameterAt | None = None
    correction: ParameterAt | None = None
    """Added to the scores for choosing experts, not to the routing weights."""
    scoring: str = "logits"
    limit: GroupLimit | None = None
    input_scale: ParameterAt | None = None
    """A weight that the router itself applies to the residual, if it has its own norm."""
    norm: PreNorm | None = None

    @property
    def is_normed(self) -> bool:
        """Whether the norm before the experts is known, so that it is undone and redone between layers."""
        return self.norm is not None

    def residual(self, hidden: Tensor) -> Tensor:
        """The input of this layer's experts, hidden (T, H), without the weight of their norm -> (T, H)."""
        return hidden if self.norm is None else self.norm.undo(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores for the input of this layer's own experts: hidden (T, H) -> (T, E), higher is likelier."""
        return self.for_choice(self.logits(self.entering(hidden)))

    def scores_of_residual(self, residual: Tensor) -> Tensor:
        """Scores for the `residual` of this layer or an earlier one: (T, H) -> (T, E), higher is likelier.

        The earlier layer may be on another device.
        """
        residual = residual.to(self.weight().device)
        if self.input_scale is not None:
            return self.for_choice(self.logits(residual * self.input_scale()))
        return self.for_choice(self.logits(residual if self.norm is None else self.norm.redo(residual)))

    def entering(self, hidden: Tensor) -> Tensor:
        """The input of the router when the input of the experts is hidden (T, H) -> (T, H), up to a factor."""
        return hidden if self.input_scale is None else self.residual(hidden) * self.input_scale()

    def logits(self, hidden: Tensor) -> Tensor:
        """The router's matrix applied to its input: (T, H) -> (T, rows), in the router's dtype."""
        weight = self.weight()
        return nn.functional.linear(hidden.to(weight.dtype), weight, None if self.bias is None else self.bias())

    def for_choice(self, logits: Tensor) -> Tensor:
        """The scores that experts are ranked by, from logits: (T, rows) -> (T, E)."""
        scores = logits
        if self.correction is not None:
            correction = self.correction().flatten()
            scores = _SCORINGS[self.scoring](scores)[..., : len(correction)] + correction
        elif self.limit is not None:
            scores = _SCORINGS[self.scoring](scores)
        if self.limit is not None:
            scores = self.limit.apply(scores)
        return scores[..., : self.num_experts]  # some routers have rows for experts without weights


def find_probe(model: nn.Module, experts_path: str) -> RouterProbe | None:
    """The scores of an experts module's router, by the module's path; None if there is none that we can reproduce."""
    router = find_router(model, experts_path)
    if router is None or router.weight is None or router.weight().is_meta:
        return None
    experts, weight, block_path = experts_at(model, experts_path), router.weight, router.path.rpartition(".")[0]
    block = model.get_submodule(block_path)
    layout, num_experts, _ = facts_of(experts)
    probe = RouterProbe(
        weight=weight,
        num_experts=num_experts,
        bias=ParameterAt(weight.owner, "bias") if getattr(weight.owner, "bias", None) is not None else None,
        correction=router.correction,
        input_scale=_find_input_scale(model.get_submodule(router.path), weight),
        norm=find_norm(model, block_path, weight().shape[1:]),
    )
    stream_dtype = next(model.parameters()).dtype  # that of the embedding; norms and routers may be kept in another
    router_name = router.path.rpartition(".")[2]
    made = _try(block, experts, router_name, probe, layout, stream_dtype)
    if made is None:
        return None
    limits = (None, *_group_limits(block.get_submodule(router_name), weight().shape[0]))
    is_ranked_by_logits = probe.correction is None and len(limits) == 1
    scorings = ("logits",) if is_ranked_by_logits else tuple(_SCORINGS)
    variants = [replace(probe, scoring=scoring, limit=limit) for limit in limits for scoring in scorings]
    with torch.no_grad():
        logits = probe.logits(probe.entering(made.reached))
        rated = [(_agreement(variant.for_choice(logits), made.experts), variant) for variant in variants]
    agreement, best = max(rated, key=lambda pair: pair[0])
    return best if agreement >= _LEAST_AGREEMENT else None


def _find_input_scale(router: nn.Module, weight: ParameterAt) -> ParameterAt | None:
    for name, parameter in router._parameters.items():
        if parameter is not None and parameter.shape == weight().shape[1:] and router is not weight.owner:
            return ParameterAt(router, name)
    return None


def _group_limits(router: nn.Module, num_rows: int) -> Iterator[GroupLimit]:
    """The possible group limits of a router with `num_group` and `topk_group`."""
    num_groups, num_kept = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if isinstance(num_groups, int) and isinstance(num_kept, int) and 0 < num_kept < num_groups <= num_rows:
        yield from (GroupLimit(num_groups, num_kept, count) for count in (2, 1) if count * num_groups <= num_rows)


@torch.no_grad()
def _try(
    block: nn.Module,
    experts: nn.Module,
    router_name: str,
    probe: RouterProbe,
    layout: ExpertsLayout,
    stream_dtype: torch.dtype,
) -> Choices | None:
    """The choices of a block for random tokens; of its router alone if the block needs more than hidden states."""
    residual = random_hidden(_TOKENS, probe.weight() if probe.norm is None else probe.norm.weight)
    hidden = residual if probe.norm is None else probe.norm.module(residual)
    # A correction weighs more against small scores than against large ones: that tells scorings apart.
    factors = 2.0 ** (torch.arange(_TOKENS, device=hidden.device) % 4 - 1)
    hidden = (hidden * factors[:, None]).to(stream_dtype)
    made = choices_of_block(block, experts, layout, probe.num_experts, hidden)
    if made is None:
        named = choices_of_router(block.get_submodule(router_name), residual if probe.input_scale else hidden)
        made = None if named is None else Choices(hidden, named)
    return made if made is not None and made.reached.shape[-1] == probe.weight().shape[-1] else None


def _agreement(scores: Tensor, chosen: list[list[int]]) -> float:
    """Share of each token's chosen experts that scores (T, E) rank before all others."""
    ranking = scores.argsort(descending=True).tolist()
    num_first = sum(len(set(ranked[: len(own)]) & set(own)) for ranked, own in zip(ranking, chosen, strict=True))
    return num_first / max(1, sum(map(len, chosen)))
