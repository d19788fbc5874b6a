"""Find each sparse layer's router, and ask it what it would choose for hidden states of an earlier layer.

A router is read off the modules beside the experts: one matrix of (experts, hidden), perhaps with a correction that is
added to its scores. Whether that is the whole of it is checked on a few random hidden states, through the module that
contains router and experts: what is found either chooses as the model does, or is not offered.
"""

# T tokens, E experts, H hidden

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.layer import OffloadedExperts, layer_of
from transformers_moe_offload.hf.layouts import ExpertField, ExpertsLayout, layout_of

_TOKENS = 32

_LEAST_AGREEMENT = 0.9
"""Share of the experts chosen in the check that a probe must rank first. Of small models of all architectures of
Transformers 5.23, those whose routers we reproduce reach 1 in float32 and 0.96 in bfloat16; others stay below 0.5."""

_NORM_TOLERANCE = 1e-4
"""A norm undone with its own weight is parallel to its input within 1e-5 in bfloat16; with weights taken for
deviations from one, or the other way round, it is off by their variance, 1e-3 or so."""

_SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "sqrt_softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
"""What architectures apply to logits before they add a correction or compare groups. All of them keep the order of the
logits, so without either there is nothing to choose."""


class GroupLimit(NamedTuple):
    """Experts are chosen only from the best groups of neighbours (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""

    num_groups: int
    num_kept: int
    num_counted: int
    """How many of a group's best experts count for it: one in DeepSeek-V2, two since V3."""

    def apply(self, scores: Tensor) -> Tensor:
        """Minus infinity for experts of other groups: scores (T, E) -> (T, E)."""
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        strength = grouped.topk(self.num_counted).values.sum(-1)
        weakest = strength.topk(self.num_kept).values[..., -1:]
        return grouped.masked_fill((strength < weakest)[..., None], -torch.inf).flatten(-2)


class ParameterAt(NamedTuple):
    """A parameter or buffer by its place, so that whatever `to` or a device map puts there is what is used."""

    owner: nn.Module
    name: str

    def __call__(self) -> Tensor:
        """What is there now."""
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, Tensor)
        return tensor


@dataclass(frozen=True, eq=False)
class PreNorm:
    """The norm before the experts: RMS or layer norm, followed by a weight and perhaps a bias of its own."""

    module: nn.Module
    is_around_one: bool
    """Whether the weight is kept as its deviation from one."""

    @property
    def weight(self) -> Tensor:
        """The norm's weight, (H,)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def undo(self, hidden: Tensor) -> Tensor:
        """Take weight and bias back: hidden (T, H) -> (T, H), zero where the weight is."""
        weight, bias = self.weight, getattr(self.module, "bias", None)
        if bias is not None:
            hidden = hidden - bias
        return (hidden / (1 + weight if self.is_around_one else weight)).nan_to_num_(0, 0, 0)

    def redo(self, residual: Tensor) -> Tensor:
        """Apply weight and bias: residual (T, H), as `undo` returns it -> (T, H)."""
        weight, bias = self.weight, getattr(self.module, "bias", None)
        hidden = torch.addcmul(residual, residual, weight) if self.is_around_one else residual * weight
        return hidden if bias is None else hidden + bias


@dataclass(frozen=True, eq=False)
class RouterProbe:
    """Scores of one sparse layer's experts. Holds modules, never copies of weights.

    To look ahead from layer `l`, take the residual once and hand it to each layer in question:

        residual = probes[l].residual(hidden)
        scores = [probes[m].scores_of_residual(residual) for m in targets]
    """

    weight: ParameterAt
    num_experts: int
    bias: ParameterAt | None = None
    correction: ParameterAt | None = None
    """What the architecture adds to scores when it chooses, and only then."""
    scoring: str = "logits"
    limit: GroupLimit | None = None
    input_scale: ParameterAt | None = None
    """A weight that the router applies to the residual itself, where it has a norm of its own."""
    norm: PreNorm | None = None

    @property
    def is_normed(self) -> bool:
        """Whether the norm before the experts is known, and taken into account between layers."""
        return self.norm is not None

    def residual(self, hidden: Tensor) -> Tensor:
        """What reaches this layer's experts, hidden (T, H), without the weight of their norm -> (T, H)."""
        return hidden if self.norm is None else self.norm.undo(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores for what reaches this layer's own experts: hidden (T, H) -> (T, E), higher is likelier."""
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
        """What enters the router when hidden (T, H) reaches the experts -> (T, H), but for a factor."""
        return hidden if self.input_scale is None else self.residual(hidden) * self.input_scale()

    def logits(self, hidden: Tensor) -> Tensor:
        """The matrix applied to what enters the router: (T, H) -> (T, rows), in the router's dtype."""
        weight = self.weight()
        return nn.functional.linear(hidden.to(weight.dtype), weight, None if self.bias is None else self.bias())

    def for_choice(self, logits: Tensor) -> Tensor:
        """What experts are ranked by: (T, rows) -> (T, E)."""
        scores = logits
        if self.correction is not None:
            correction = self.correction().flatten()
            scores = _SCORINGS[self.scoring](scores)[..., : len(correction)] + correction
        elif self.limit is not None:
            scores = _SCORINGS[self.scoring](scores)
        if self.limit is not None:
            scores = self.limit.apply(scores)
        return scores[..., : self.num_experts]  # some routers have rows for experts without weights


def find_router(model: nn.Module, experts_path: str) -> RouterProbe | None:
    """The router of an experts module, by the module's path; None where there is none that we can reproduce."""
    experts = model.get_submodule(experts_path)
    layout, num_experts, fields = _experts_facts(experts)
    block_path, _, experts_name = experts_path.rpartition(".")
    block = model.get_submodule(block_path)
    found = _find_matrix(block, experts_name, num_experts, fields[0].shape)
    if found is None:
        return None
    router_name, weight = found
    if weight().is_meta:
        return None
    probe = RouterProbe(
        weight=weight,
        num_experts=num_experts,
        bias=ParameterAt(weight.owner, "bias") if getattr(weight.owner, "bias", None) is not None else None,
        correction=_find_correction(block, experts_name, num_experts, weight),
        input_scale=_find_input_scale(block.get_submodule(router_name), weight),
        norm=_find_norm(model, block_path, weight),
    )
    stream_dtype = next(model.parameters()).dtype  # that of the embedding; norms and routers may be kept in another
    tried = _try(block, experts, router_name, probe, layout, stream_dtype)
    if tried is None:
        return None
    limits = (None, *_group_limits(block.get_submodule(router_name), weight().shape[0]))
    is_ranked_by_logits = probe.correction is None and len(limits) == 1
    scorings = ("logits",) if is_ranked_by_logits else tuple(_SCORINGS)
    variants = [replace(probe, scoring=scoring, limit=limit) for limit in limits for scoring in scorings]
    agreement, best = max(((tried.agreement(one), one) for one in variants), key=lambda pair: pair[0])
    return best if agreement >= _LEAST_AGREEMENT else None


def _experts_facts(experts: nn.Module) -> tuple[ExpertsLayout, int, tuple[ExpertField, ...]]:
    """Layout, number of experts and fields, whether or not the module is offloaded."""
    if isinstance(experts, OffloadedExperts):
        layer = layer_of(experts)
        return layer.layout, layer.num_experts, layer.fields
    layout = layout_of(experts)
    assert layout is not None, f"{type(experts).__name__} holds no routed experts"
    return layout, layout.num_experts(experts), layout.fields(experts)


def _find_matrix(
    block: nn.Module, experts_name: str, num_experts: int, field_shape: tuple[int, ...]
) -> tuple[str, ParameterAt] | None:
    """The (experts, hidden) matrix, and the child of the block that it is in; one named for what it is comes first."""
    found = []
    for path, module in _beside(block, experts_name):
        weight = module._parameters.get("weight")
        if path and weight is not None and weight.dim() == 2:
            rows, columns = weight.shape
            if num_experts <= rows <= 2 * num_experts and columns in field_shape:
                found.append((path.partition(".")[0], ParameterAt(module, "weight")))
    named = [(name, place) for name, place in found if name == "gate" or "router" in name]
    return next(iter(named or found), None)


def _find_correction(block: nn.Module, experts_name: str, num_experts: int, weight: ParameterAt) -> ParameterAt | None:
    """A bias with one entry an expert that is not the matrix's own; it may be a buffer."""
    for _, module in _beside(block, experts_name):
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or "bias" not in name or (module is weight.owner and name == "bias"):
                continue
            if tensor.numel() in (num_experts, weight().shape[0]) and tensor.shape[-1] == tensor.numel():
                return ParameterAt(module, name)
    return None


def _find_input_scale(router: nn.Module, weight: ParameterAt) -> ParameterAt | None:
    for name, parameter in router._parameters.items():
        if parameter is not None and parameter.shape == weight().shape[1:] and router is not weight.owner:
            return ParameterAt(router, name)
    return None


def _group_limits(router: nn.Module, num_rows: int) -> Iterator[GroupLimit]:
    """What a router's numbers of groups may mean."""
    num_groups, num_kept = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if isinstance(num_groups, int) and isinstance(num_kept, int) and 0 < num_kept < num_groups <= num_rows:
        yield from (GroupLimit(num_groups, num_kept, count) for count in (2, 1) if count * num_groups <= num_rows)


def _beside(block: nn.Module, experts_name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block, with their paths, without its experts."""
    for path, module in block.named_modules():
        if path.partition(".")[0] != experts_name:
            yield path, module


_NORMS_BEFORE_EXPERTS = (
    r"pre_(feedforward|feed_forward|ffn?|mlp|moe)_.*norm.*",
    r"(ffn?|mlp|moe|feed_forward)_(layer_?)?norm",
    r".*norm_?2",
    r"post_attention_(layer)?norm(\.0)?",
)
"""What the norm between attention and experts is called, surest name first. Of several that fit one name the last is
meant: decoder layers with a dense MLP beside the experts declare the norm of that first."""

_NORM_BEFORE_ATTENTION = r"input_(layer)?norm(\.0)?"


def _find_norm(model: nn.Module, block_path: str, weight: ParameterAt) -> PreNorm | None:
    """The norm whose output enters the block, from the nearest module around it that has norms."""
    width = weight().shape[1:]
    is_attention = re.search(r"attention|attn", block_path) is not None
    path, block = block_path, model.get_submodule(block_path)
    while path:
        around = model.get_submodule(path)
        norms = {
            name: module
            for name, module in around.named_modules()
            if name.count(".") < 2 and re.search(r"norm", name) and _has_weight(module, width)
        }
        if around is not block:
            inside = set(block.modules())
            norms = {name: module for name, module in norms.items() if module not in inside}
        name = _choose_norm(list(norms), is_attention, may_be_only_one=around is not block)
        if name is not None:
            return _pre_norm(norms[name])
        if norms and around is not block:
            return None
        path = path.rpartition(".")[0]
    return None


def _has_weight(module: nn.Module, shape: torch.Size) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.shape == shape


def _choose_norm(names: list[str], is_attention: bool, *, may_be_only_one: bool) -> str | None:
    before_attention = [name for name in names if re.fullmatch(_NORM_BEFORE_ATTENTION, name)]
    if is_attention:
        return before_attention[0] if before_attention else None
    for pattern in _NORMS_BEFORE_EXPERTS:
        fitting = [name for name in names if re.fullmatch(pattern, name)]
        # Where nothing is normed before the attention, what comes after it norms its output, not the experts' input.
        if fitting and (before_attention or not pattern.startswith("post_attention")):
            return fitting[-1]
    return names[0] if may_be_only_one and len(names) == 1 else None


@torch.no_grad()
def _pre_norm(module: nn.Module) -> PreNorm | None:
    """How to undo a norm, found by trying; None if it does more than scale by its weight."""
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.is_meta:
        return None
    x = _random_hidden(1, weight)
    normed = module(x)
    directions = (x.float(), (x - x.mean()).float())
    for is_around_one in (False, True):
        norm = PreNorm(module, is_around_one)
        undone = norm.undo(normed).float()
        if max(nn.functional.cosine_similarity(undone, x).item() for x in directions) > 1 - _NORM_TOLERANCE:
            return norm
    return None


@dataclass(frozen=True)
class _Trial:
    """What a block did with some random tokens."""

    logits: Tensor
    """(T, rows) of its router, as we compute them."""
    chosen: list[list[int]]
    """The experts of each token."""

    def agreement(self, probe: RouterProbe) -> float:
        """Share of the chosen experts that a probe ranks before all others."""
        ranking = probe.for_choice(self.logits).argsort(descending=True).tolist()
        pairs = zip(ranking, self.chosen, strict=True)
        num_first = sum(len(set(ranked[: len(chosen)]) & set(chosen)) for ranked, chosen in pairs)
        return num_first / max(1, sum(map(len, self.chosen)))


@torch.no_grad()
def _try(
    block: nn.Module,
    experts: nn.Module,
    router_name: str,
    probe: RouterProbe,
    layout: ExpertsLayout,
    stream_dtype: torch.dtype,
) -> _Trial | None:
    """Run the block up to its experts, or, where that needs more than hidden states, its router alone."""
    residual = _random_hidden(_TOKENS, probe.weight() if probe.norm is None else probe.norm.weight)
    hidden = residual if probe.norm is None else probe.norm.module(residual)
    # A correction weighs more against small scores than against large ones: that tells scorings apart.
    factors = 2.0 ** (torch.arange(_TOKENS, device=hidden.device) % 4 - 1)
    hidden = (hidden * factors[:, None]).to(stream_dtype)
    try:
        calls = _calls_by_token(block, experts, hidden)
        reached = torch.cat([inputs[0].flatten(0, -2)[:1] for inputs in calls])
        chosen = [layout.wanted(probe.num_experts, *inputs) for inputs in calls]
    except _CANNOT_RUN:
        try:
            outputs = block.get_submodule(router_name)(residual if probe.input_scale else hidden)
        except _CANNOT_RUN:
            return None
        indices = [out for out in outputs if isinstance(out, Tensor) and not out.is_floating_point()]
        if len(indices) != 1 or len(indices[0]) != _TOKENS:
            return None  # it answers in a way that we do not know
        reached, chosen = hidden, indices[0].tolist()
    if reached.shape[-1] != probe.weight().shape[-1]:
        return None
    return _Trial(probe.logits(probe.entering(reached)), chosen)


def _calls_by_token(block: nn.Module, experts: nn.Module, hidden: Tensor) -> list[tuple[Any, ...]]:
    """What the experts are called with for each token of hidden (T, H)."""
    inputs = _inputs_of_experts(block, experts, hidden[None])
    if all(isinstance(tensor, Tensor) for tensor in inputs):
        rows = [tensor if len(tensor) == len(hidden) else tensor.flatten(0, -2) for tensor in inputs]
        if all(len(tensor) == len(hidden) for tensor in rows):
            return list(zip(*(tensor.split(1) for tensor in rows), strict=True))
    return [_inputs_of_experts(block, experts, token[None]) for token in hidden.split(1)]


_CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
"""What a module raises that needs more than a token's hidden states, such as positions or token ids."""


class _ReachedExpertsError(Exception):
    """Carries the inputs of the experts out of the block."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.inputs = inputs


def _inputs_of_experts(block: nn.Module, experts: nn.Module, hidden: Tensor) -> tuple[Any, ...]:
    """Run a block as far as its experts: hidden (1, N, H) -> the arguments that the experts get."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ReachedExpertsError(args + tuple(kwargs.values()))

    hook = experts.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        block(hidden)
    except _ReachedExpertsError as reached:
        return reached.inputs
    finally:
        hook.remove()
    raise RuntimeError("the block does not call its experts")


def _random_hidden(num_tokens: int, like: Tensor) -> Tensor:
    """(N, H) in the dtype and on the device of a weight, always the same."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, like.shape[-1], generator=random).to(like)
