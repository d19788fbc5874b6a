"""Find the norm before a sparse layer's experts, and undo and redo the effect of its weight."""

# T tokens, N rows, H hidden

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NORM_TOLERANCE = 1e-4
"""A norm undone with its own weight is parallel to its input within 1e-5 in bfloat16; if weights are mistaken for
deviations from one, or the other way round, the difference is their variance, about 1e-3."""


@dataclass(frozen=True, eq=False)
class PreNorm:
    """The norm before the experts: RMS or layer norm, followed by a weight and perhaps a bias of its own."""

    module: nn.Module
    is_around_one: bool
    """Whether the weight is stored as its deviation from one."""

    @property
    def weight(self) -> Tensor:
        """The norm's weight, (H,)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def undo(self, hidden: Tensor) -> Tensor:
        """Undo weight and bias: hidden (T, H) -> (T, H), zero where the weight is zero."""
        weight, bias = self.weight, getattr(self.module, "bias", None)
        if bias is not None:
            hidden = hidden - bias
        return (hidden / (1 + weight if self.is_around_one else weight)).nan_to_num_(0, 0, 0)

    def redo(self, residual: Tensor) -> Tensor:
        """Apply weight and bias: residual (T, H), as `undo` returns it -> (T, H)."""
        weight, bias = self.weight, getattr(self.module, "bias", None)
        hidden = torch.addcmul(residual, residual, weight) if self.is_around_one else residual * weight
        return hidden if bias is None else hidden + bias


_NORMS_BEFORE_EXPERTS = (
    r"pre_(feedforward|feed_forward|ffn?|mlp|moe)_.*norm.*",
    r"(ffn?|mlp|moe|feed_forward)_(layer_?)?norm",
    r".*norm_?2",
    r"post_attention_(layer)?norm(\.0)?",
)
"""Names of the norm between attention and experts, the surest first. If several norms match one pattern, the last is
used: decoder layers with a dense MLP beside the experts declare the norm of that MLP first."""

_NORM_BEFORE_ATTENTION = r"([qkv]_)?input_(layer)?norm(\.0)?"


def find_norm(model: nn.Module, block_path: str, width: torch.Size) -> PreNorm | None:
    """The norm whose output, of size `width`, enters the block; from the nearest module around it that has norms."""
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
        # Without a norm before the attention, one after it applies to its output, not to the experts' input.
        if fitting and (before_attention or not pattern.startswith("post_attention")):
            return fitting[-1]
    return names[0] if may_be_only_one and len(names) == 1 else None


@torch.no_grad()
def _pre_norm(module: nn.Module) -> PreNorm | None:
    """How to undo a norm, found by trial on random input; None if it does more than scale by its weight."""
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.is_meta:
        return None
    x = random_hidden(1, weight)
    normed = module(x)
    directions = (x.float(), (x - x.mean()).float())
    for is_around_one in (False, True):
        norm = PreNorm(module, is_around_one)
        undone = norm.undo(normed).float()
        if max(nn.functional.cosine_similarity(undone, x).item() for x in directions) > 1 - _NORM_TOLERANCE:
            return norm
    return None


def random_hidden(num_tokens: int, like: Tensor) -> Tensor:
    """Random numbers (N, H) in the dtype and on the device of a weight, the same at each call."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, like.shape[-1], generator=random).to(like)
