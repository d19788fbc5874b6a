"""Find what was recorded of the tokens that a model reads, by the tokens before them."""

# B sequences, S their length in a forward, N recorded tokens

from __future__ import annotations

import weakref
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.routing.recorded_texts import RecordedTexts
from transformers_moe_offload.routing.texts import Prefixes, Texts, texts_of
from transformers_moe_offload.tracing import TraceError

Missing = Literal["error", "last", "router"]
"""What becomes of a token without a recorded route. "error": an error names it. "last": the token after the last one
with a route is left to the router, as a rollout samples it and does not read it. "router": all are left to the
router."""


class Routes:
    """Places of tokens in the texts of a recording."""

    def __init__(self, recorded: RecordedTexts, missing: Missing) -> None:
        self._missing = missing
        self._num_left_out = recorded.num_left_out
        self._has_route = has_route = recorded.has_route
        prefix = _prefixes(recorded)
        # The first of several texts that begin with the same tokens.
        self._keys, self._places = np.unique(prefix, return_index=True)
        follows = np.r_[(recorded.text[1:] == recorded.text[:-1]) & has_route[1:], False][: len(prefix)]
        is_end = has_route & ~follows
        self._ends, self._end_places = np.unique(prefix[is_end], return_index=True)
        self._end_places = np.flatnonzero(is_end)[self._end_places]
        self._found: weakref.WeakKeyDictionary[Texts, NDArray[np.int64]] = weakref.WeakKeyDictionary()

    def find(self, texts: Texts) -> NDArray[np.int64]:
        """(B, S): each token's place among the recorded ones; -1 for padding and tokens that are left to the router.

        Of recorded texts with the same tokens the first is taken. Raises `TraceError` for a token without a route.
        """
        places = self._found.get(texts)
        if places is None:
            rows = [self._of_row(texts, row) for row in range(len(texts.token_ids))]
            places = self._found[texts] = np.stack(rows) if rows else np.empty(texts.token_ids.shape, np.int64)
        return places

    def _of_row(self, texts: Texts, row: int) -> NDArray[np.int64]:
        """(S,)."""
        places = np.full(texts.token_ids.shape[1], -1)
        (columns,) = np.nonzero(~texts.is_padding[row])
        position = texts.position[row, columns]
        known = _look_up(self._keys, self._places, texts.prefix[row, columns])
        # Texts are known up to a token, and not beyond; the last known token says which text it is.
        num_known = int((known >= 0).sum())
        if num_known:
            last = known[num_known - 1]
            if num_known < len(columns):  # rather one that ends here than one that goes on otherwise
                end = _look_up(self._ends, self._end_places, texts.prefix[row, columns[num_known - 1], None])[0]
                last = end if end >= 0 else last
            places[columns[:num_known]] = last - (position[num_known - 1] - position[:num_known])
        is_missing = places[columns] < 0
        is_missing |= ~self._has_route[places[columns]] if len(self._has_route) else True
        missing = np.flatnonzero(is_missing)
        if len(missing) and self._missing != "router" and not self._is_last(texts, row, columns, missing):
            self._refuse(texts, row, int(columns[missing[0]]))
        places[columns[missing]] = -1
        return places

    def _is_last(self, texts: Texts, row: int, columns: NDArray[np.int64], missing: NDArray[np.int64]) -> bool:
        """Whether the only missing token is the one that a rollout has sampled last."""
        if self._missing != "last" or len(missing) > 1 or missing[0] < len(columns) - 1:
            return False
        before = texts.prefix[row, columns[-2]] if len(columns) > 1 else texts.prefix_before[row]
        return bool(_look_up(self._ends, self._end_places, np.array([before], np.uint64))[0] >= 0)

    def _refuse(self, texts: Texts, row: int, column: int) -> None:
        token, position = texts.token_ids[row, column], texts.position[row, column]
        left_out = (
            f" ({self._num_left_out} recorded tokens belong to texts whose beginning was not recorded)"
            if self._num_left_out
            else ""
        )
        raise TraceError(
            f"the trace has no route of token {position} (id {token}) of row {row} after the tokens before it, among "
            f"{len(self._has_route)} recorded tokens{left_out}; record this text, or leave such tokens to the router "
            "with "
            f'missing="router", or only the last one of a rollout with missing="last"'
        )


def _prefixes(recorded: RecordedTexts) -> Prefixes:
    """(N,)."""
    if not len(recorded.text):
        return np.empty(0, np.uint64)
    starts = np.flatnonzero(recorded.position == 0)
    ends = np.r_[starts[1:], len(recorded.text)]
    many = [texts_of(recorded.token_ids[None, start:end]).prefix[0] for start, end in zip(starts, ends, strict=True)]
    return np.concatenate(many)


def _look_up(keys: Prefixes, values: NDArray[np.int64], wanted: Prefixes) -> NDArray[np.int64]:
    """The values of some keys, which are sorted; -1 where there is none."""
    if not len(keys):
        return np.full(len(wanted), -1)
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], -1)
