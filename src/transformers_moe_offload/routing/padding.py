"""Which tokens of a forward are padding, told from its attention mask, whatever form Transformers has given that."""

# B texts, S tokens of each that the forward reads, T tokens of each that it can attend to, those included

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.errors import UnsupportedModelError


def padding_of(mask: Any, batch: int, length: int, before: int) -> Tensor | None:
    """(B, S) bool; None where there is no mask, so no padding.

    Args:
        mask: (B, T), zero at padding; (B or 1, 1, S, T) bool, or float that is added to scores, as `generate` makes of
            it for static caches; or several of these by the layers that they are for.
        batch: B.
        length: S.
        before: tokens of each text that earlier forwards have read.

    Raises `UnsupportedModelError` for a mask of another form.
    """
    if isinstance(mask, Mapping):  # of full and of sliding attention: the wider one forgets nothing
        mask = max((one for one in mask.values() if isinstance(one, Tensor)), key=lambda m: m.shape[-1], default=None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() in (2, 4) and mask.shape[0] in (1, batch) and mask.shape[-1] >= length:
        # A window of attention that is full holds the newest tokens last.
        first = min(before, mask.shape[-1] - length)
        if mask.dim() == 2:
            is_padding = mask[:, first : first + length] == 0
        else:  # a token that is no padding attends to itself, and padding to nothing
            to_itself = mask[:, 0].diagonal(first, -2, -1)
            is_padding = to_itself != 0 if to_itself.is_floating_point() else to_itself == 0
        if is_padding.shape[-1] == length:
            return is_padding.expand(batch, length)
    described = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
    raise UnsupportedModelError(
        f"cannot tell which of {batch} x {length} tokens are padding from an attention mask of {described}; "
        f"pass one of shape ({batch}, {before + length}), or none if nothing is padded"
    )


def expect_texts_apart(positions: Any, is_padding: Tensor | None, shape: torch.Size) -> None:
    """Raise `UnsupportedModelError` where positions, (B, S), begin again within a row: it is several texts."""
    if not isinstance(positions, Tensor) or positions.shape != shape or shape[1] < 2:
        return
    begins_again = positions.diff(dim=1) < 1
    if is_padding is not None:
        begins_again &= ~(is_padding[:, 1:] | is_padding[:, :-1]).to(begins_again.device)
    if begins_again.any():  # sync: device -> host, of a prompt that is recorded
        row = int(begins_again.any(dim=1).nonzero()[0])
        raise UnsupportedModelError(
            f"position_ids of row {row} begin again within it, so several texts are packed in it, which a recording "
            f"could not tell apart; record them as rows of a padded batch, or one after the other"
        )
