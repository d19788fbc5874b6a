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

from transformers_moe_offload.errors import ConfigError

_SOFTNESS = 0.1
"""Width of the edge between chosen and not chosen, as a share of the range of a token's logits. On tiny-moe a loss with
such an edge gains twice the cache hits of one of probabilities, at the same rise of the text's loss: it moves experts
that are next to the edge anyway, and leaves the others alone (24 steps of 2,048 tokens; +0.020 hit rate at +0.004
nats)."""


def locality_loss(logits: Tensor, top_k: int, follows: Tensor, window: int) -> Tensor:
    """How much of what tokens choose was not chosen just before, and the other way round -> ().

    0 where every token chooses the experts of the `window` tokens before it, 1 where it chooses none of them and
    neither is near the edge of being chosen. The gradient is that of this choice, made soft, not of the one before.
    Zero where no token follows one.

    Args:
        logits: (T, E) of the tokens of B texts, one text after the other.
        top_k: how many experts a token chooses.
        follows: (B, S) bool: whether a token comes right after the one before it in its row.
        window: W.
    """
    batch, length = follows.shape
    rows = logits.view(batch, length, -1)
    best = rows.detach().topk(min(top_k + 1, rows.shape[-1]))
    is_chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, best.indices[..., :top_k], True)
    is_recent = torch.zeros_like(is_chosen)
    reaches = torch.ones_like(follows)  # whether the token so many places back is of the same text
    for back in range(1, min(window, length - 1) + 1):
        reaches = reaches & _shifted(follows, back - 1)
        is_recent = is_recent | (_shifted(is_chosen, back) & reaches[..., None])
    edge = best.values[..., top_k - 1 :].mean(-1, keepdim=True)  # between the last chosen and the first rejected
    width = _SOFTNESS * (rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)).detach()
    chosen = torch.sigmoid((rows - edge) / width.clamp(min=torch.finfo(rows.dtype).tiny))  # softly: 0 to 1
    apart = torch.where(is_recent, 1 - chosen, chosen).sum(-1) / (is_recent.sum(-1) + top_k)
    return (apart * follows).sum() / follows.sum().clamp(min=1)


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
