"""The texts of a recording: their tokens, and the experts that each was given at every router."""

# N tokens of all texts, K experts per token

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace_data import RecordedRouting, tokens_of, turns_of
from transformers_moe_offload.tracing import TraceError


class RecordedTexts(NamedTuple):
    """Tokens of all texts that were recorded from their beginning, one text after the other, without padding."""

    text: NDArray[np.int64]
    """(N,): the number of each token's text in the recording, ascending."""
    position: NDArray[np.int64]
    """(N,): how many tokens of its text come before."""
    token_ids: NDArray[np.int64]
    """(N,)."""
    experts: list[NDArray[np.int16]]
    """(N, K) for each router, filled up with -1."""
    weights: list[NDArray[np.float32]]
    """(N, K) for each router, NaN where they were not recorded."""
    num_left_out: int
    """Tokens of texts whose beginning was not recorded: beams that have forked, and texts after drafts were
    rejected."""

    @property
    def has_route(self) -> NDArray[np.bool_]:
        """(N,): whether all routers' choices are known; an import has no choice of the last token, which was
        sampled."""
        known = np.ones(len(self.text), np.bool_)
        for experts, weights in zip(self.experts, self.weights, strict=True):
            known &= ~((experts < 0).all(axis=1) & np.isnan(weights).all(axis=1))
        return known

    @property
    def has_weights(self) -> bool:
        """Whether weights were recorded for all choices."""
        pairs = zip(self.experts, self.weights, strict=True)
        return not any(np.isnan(weights[experts >= 0]).any() for experts, weights in pairs)


def recorded_texts(trace: RecordedRouting) -> RecordedTexts:
    """Gather the texts of a recording, which has to fit into memory.

    Raises `TraceError` for layers that run several times in a forward.
    """
    columns: dict[str, list[NDArray[np.int64]]] = {name: [] for name in ("sequence", "position", "token_ids", "place")}
    num_routers = len(trace.routers)
    experts: list[list[NDArray[np.int16]]] = [[] for _ in range(num_routers)]
    weights: list[list[NDArray[np.float32]]] = [[] for _ in range(num_routers)]
    is_padding: list[NDArray[np.bool_]] = []
    for part in trace.parts():
        num_tokens = len(part["token_ids"])
        for name in ("sequence", "position", "token_ids"):
            columns[name].append(part[name].astype(np.int64))
        is_padding.append(part["is_padding"] != 0)
        for router in range(num_routers):
            if turns_of(part, router).any():
                raise TraceError(
                    f"router {trace.routers[router].router} runs several times in a forward, so its tokens have "
                    f"several routes each; texts and their routes are supported for models with one route of a token"
                )
            chosen, of_token = part[f"experts.{router}"], tokens_of(part, router)
            is_text = of_token >= 0
            rows = np.full((num_tokens, chosen.shape[1]), -1, np.int16)
            factors = np.full(rows.shape, np.nan, np.float32)
            rows[of_token[is_text]] = chosen[is_text]
            factors[of_token[is_text]] = part[f"weights.{router}"][is_text]
            experts[router].append(rows)
            weights[router].append(factors)
    sequence, position, token_ids = (
        np.concatenate([np.empty(0, np.int64), *columns[name]]) for name in list(columns)[:3]
    )
    padded = np.concatenate([np.empty(0, np.bool_), *is_padding])
    order = np.lexsort((position, sequence))
    is_whole = _are_whole(sequence[order], position[order])
    kept = order[is_whole & ~padded[order]]
    text = sequence[kept]
    starts = np.flatnonzero(np.r_[True, text[1:] != text[:-1]]) if len(text) else np.empty(0, np.int64)
    lengths = np.diff(np.r_[starts, len(text)])
    return RecordedTexts(
        text,
        np.arange(len(text)) - np.repeat(starts, lengths),
        token_ids[kept],
        [measures.stacked([np.empty((0, 1), np.int16), *many], -1)[kept] for many in experts],
        [_filled([np.empty((0, 1), np.float32), *many])[kept] for many in weights],
        int((~is_whole & ~padded[order]).sum()),
    )


def _are_whole(sequence: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the texts of sorted tokens (N,) have all columns of the KV cache from the first one on -> (N,)."""
    if not len(sequence):
        return np.empty(0, np.bool_)
    starts = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    lengths = np.diff(np.r_[starts, len(sequence)])
    expected = np.arange(len(sequence)) - np.repeat(starts, lengths)
    whole = np.logical_and.reduceat(position == expected, starts)
    return np.repeat(whole, lengths)


def _filled(many: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Weights (N, K) below one another, filled up with zeros, as entries that only fill up a row weigh nothing."""
    width = max(array.shape[1] for array in many)
    return np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in many])
