"""Which tokens of a forward are padding, read from its attention mask in any form that Transformers gives it.

Rows that pack several texts are refused, by their attention mask and by their positions.
"""

# B texts, S tokens of each that the forward reads, T tokens of each that it can attend to, those included, R rows of
# positions: of the text, and of images in time, height and width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.errors import UnsupportedModelError


def padding_of(mask: Any, batch: int, length: int, before: int) -> Tensor | None:
    """(B, S) bool; None where there is no mask, so no padding.

    Args:
        mask: (B, T), zero at padding; (B or 1, 1, S, T) bool, or float that is added to scores, as `generate` makes it
            for static caches; or a mapping from kinds of layers to such masks.
        batch: B.
        length: S.
        before: tokens of each text that earlier forwards have read.

    Raises `UnsupportedModelError` for a mask of another form, and for a mask that packs several texts into a row.
    """
    if isinstance(mask, Mapping):  # of full, sliding and chunked attention: the widest one covers all tokens
        masks = [one for one in (mask.get("full_attention"), *mask.values()) if isinstance(one, Tensor)]
        mask = max(masks, key=lambda m: m.shape[-1], default=None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() in (2, 4) and mask.shape[0] in (1, batch) and mask.shape[-1] >= length:
        # A full attention window holds the newest tokens last.
        first = min(before, mask.shape[-1] - length)
        if mask.dim() == 2:
            is_padding = mask[:, first : first + length] == 0
        else:  # a token of text attends to itself, and padding to nothing
            to_itself = mask[:, 0].diagonal(first, -2, -1)
            is_padding = to_itself != 0 if to_itself.is_floating_point() else to_itself == 0
        if is_padding.shape[-1] == length:
            is_padding = is_padding.expand(batch, length)
            if mask.dim() == 4 and length > 1:
                _expect_attended(mask[:, 0, 1:].diagonal(first, -2, -1), is_padding)
            return is_padding
    described = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
    raise UnsupportedModelError(
        f"cannot tell which of {batch} x {length} tokens are padding from an attention mask of {described}; "
        f"pass one of shape ({batch}, {before + length}), or none if nothing is padded"
    )


def _expect_attended(to_previous: Tensor, is_padding: Tensor) -> None:
    """Refuse a row with a token that does not attend to the one before it: a block or a branch begins there.

    to_previous (B or 1, S - 1), entries of a 4-D mask; is_padding (B, S).
    """
    is_apart = to_previous != 0 if to_previous.is_floating_point() else to_previous == 0
    _refuse_packed(is_apart, is_padding, "attention_mask", "keeps its tokens apart")


def expect_texts_apart(positions: Any, is_padding: Tensor | None, shape: torch.Size) -> None:
    """Raise `UnsupportedModelError` where positions begin again within a row: the row packs several texts.

    positions (S,), (B or 1, S) or (R, B or 1, S); other shapes are ignored. is_padding (B, S), like `shape`.
    """
    if not isinstance(positions, Tensor) or not 1 <= positions.dim() <= 3 or shape[1] < 2:
        return
    rows = positions[(None,) * (3 - positions.dim())]
    if rows.shape[1] not in (1, shape[0]) or rows.shape[2] != shape[1]:
        return
    if len(rows) == 4:  # the first row is the text's, then time, height, width (5.24, `Qwen3VLMoeTextModel.forward`)
        rows = rows[:1]
    steps = rows.diff(dim=-1)
    if len(rows) == 1:
        begins_again = steps[0] < 1
    else:  # the next frame of a video begins again in height and width only
        begins_again = (steps < 1).all(dim=0) & ((steps[0] < 0) | (steps == 0).all(dim=0))
    _refuse_packed(begins_again, is_padding, "position_ids", "begin again within it")


def _refuse_packed(is_apart: Tensor, is_padding: Tensor | None, argument: str, reason: str) -> None:
    """Raise where `is_apart` (B or 1, S - 1) separates a token from the one before it, neither of them padding."""
    if is_padding is not None:
        is_apart = is_apart & ~(is_padding[:, 1:] | is_padding[:, :-1]).to(is_apart.device)
    if is_apart.any():  # sync: device -> host, of a prompt that is recorded
        row = int(is_apart.any(dim=1).nonzero()[0])
        raise UnsupportedModelError(
            f"{argument} of row {row} {reason}, so several texts are packed in it, which a recording could not tell "
            f"apart, nor a replay; pass them as rows of a padded batch, or one after the other"
        )
