"""A loss that rewards a router for choosing what it has chosen lately, so that a small cache holds what is asked for
next.

After ReMoE, Zhu et al. 2026 (arXiv 2605.27081), which trains routers alone for reuse between neighbouring tokens. Here
the text's own loss keeps the router from forgetting what it is for, where ReMoE has a divergence from the router it
began with.
"""

# B sequences, S their length, T = B * S tokens, E experts, W tokens that count as lately

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.errors import ConfigError


def locality_loss(logits: Tensor, top_k: int, follows: Tensor, window: int) -> Tensor:
    """The mean share of the probability that is not on experts which the tokens just before have chosen -> ().

    Between 0 and 1; the gradient is that of the probabilities, not of the choice before. Zero where no token follows
    one.

    Args:
        logits: (T, E) of the tokens of B texts, one text after the other.
        top_k: how many experts a token chooses.
        follows: (B, S) bool: whether a token comes right after the one before it in its row.
        window: W.
    """
    batch, length = follows.shape
    rows = logits.view(batch, length, -1)
    chosen = functional.one_hot(rows.topk(top_k).indices, rows.shape[-1]).amax(2).bool()  # (B, S, E)
    is_recent = torch.zeros_like(chosen)
    reaches = torch.ones_like(follows)  # whether the token so many places back is of the same text
    for back in range(1, min(window, length - 1) + 1):
        reaches = reaches & _shifted(follows, back - 1)
        is_recent = is_recent | (_shifted(chosen, back) & reaches[..., None])
    missed = 1 - (rows.softmax(-1) * is_recent).sum(-1)
    return (missed * follows).sum() / follows.sum().clamp(min=1)


def follows_in(num_tokens: int, kwargs: dict[str, Any], args: tuple[Any, ...]) -> Tensor:
    """(B, S) bool: which tokens of a forward come right after another one; raises `ConfigError` for unknown rows.

    Padding follows nothing, and nothing follows it; nor does a token whose position is not the next one, as where
    several texts are packed into a row.
    """
    given = next(
        (one for one in (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds")) if one is not None), None
    )
    if not isinstance(given, Tensor) or given.dim() < 2 or given.shape[0] * given.shape[1] != num_tokens:
        shape = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else "none"
        raise ConfigError(
            f"locality compares each token with those before it, but a router was given {num_tokens} rows and the "
            f"model input_ids {shape}; set locality=0 for this model"
        )
    batch, length = given.shape[:2]
    follows = torch.ones(batch, length, dtype=torch.bool, device=given.device)
    follows[:, 0] = False
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == follows.shape:
        is_text = mask != 0
        follows[:, 1:] &= is_text[:, 1:] & is_text[:, :-1]
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == length:
        follows[:, 1:] &= positions.diff(dim=-1) == 1
    return follows


def _shifted(rows: Tensor, back: int) -> Tensor:
    """rows (B, S, ...) -> those `back` places before, False where there is none."""
    if not back:
        return rows
    return torch.cat([torch.zeros_like(rows[:, :back]), rows[:, :-back]], dim=1)
