"""Is a forward a step of decoding, or does it read a prompt?"""

# B sequences, S positions of each in this forward

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformers_moe_offload.hf.upstream import ENDS_OF_TEXTS
from transformers_moe_offload.routing.forward import Forward

MOST_DRAFTED = 32
"""Tokens of a text in one step: drafts of assisted generation propose up to 20 by default, prompt lookup 10. Prompts
that are read in pieces come in larger ones."""


def is_step(forward: Forward) -> bool:
    """Whether every text goes on by one token, or by at most `MOST_DRAFTED` after others that it has read before."""
    length = _length(forward)
    if length is None:
        return False
    ends = forward.inputs.get(ENDS_OF_TEXTS)
    if isinstance(ends, Tensor):  # texts of differing lengths in one row, as continuous batching has them
        return ends.numel() - 1 == length
    return length == 1 or (length <= MOST_DRAFTED and (forward.num_before or 0) > 0)


def _length(forward: Forward) -> int | None:
    """S; None in a forward that was given neither tokens nor embeddings."""
    given: Any = forward.token_ids
    if given is None:
        given = forward.inputs.get("inputs_embeds")
    return int(given.shape[1]) if isinstance(given, Tensor) and given.dim() >= 2 else None
