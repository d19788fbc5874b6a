"""Collect routers' decisions in arrays, until they are enough for a part of a trace.

Steps wait as tensors and are copied some dozens at a time: while a model decodes, a step is a few small tensors for
each router, and copying each by itself would cost more than the routing.
"""

# B sequences, S their length, N tokens at one router, K experts per token, E experts, H hidden

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.forward import Forward, Past
from transformers_moe_offload.routing.moved_rows import Move
from transformers_moe_offload.routing.trace_file import TOKEN_DTYPES, Part

_FEW_ROWS = 512
"""Rows of all routers that may wait to be copied: some dozens of decode steps, or one prompt."""


class CallRecord(NamedTuple):
    """One call of one router."""

    router: int
    scores: Tensor | None
    experts: Tensor
    weights: Tensor
    is_kept: Tensor | None
    hidden: Tensor | None
    token_ids: Tensor | None
    is_padding: Tensor | None
    """(B, S) bool, like `token_ids`; None where there is no padding."""
    is_encoding: bool = False
    """Whether the tokens are an encoder's: they begin new texts instead of continuing those of the step."""


class StepRecord(NamedTuple):
    """One forward."""

    calls: list[CallRecord]
    forward: Forward
    domain: int


class _Texts(NamedTuple):
    """Rows of one KV cache."""

    numbers: tuple[int, ...]
    """Number of each row's text in the whole trace."""
    num_tokens: int
    """Tokens read so far of each."""


class RoutingBuffer:
    """Turns steps into parts. `scores` is the dtype in which scores are kept."""

    def __init__(self, num_routers: int, scores: torch.dtype | None) -> None:
        self.num_steps = 0
        """Steps of the whole trace, like the counts below."""
        self.num_tokens = 0
        self._num_routers = num_routers
        self._scores = scores
        self._num_sequences = 0
        self._texts_of: weakref.WeakKeyDictionary[Past, _Texts] = weakref.WeakKeyDictionary()
        """Texts that a later step may continue."""
        self._waiting: list[StepRecord] = []
        self._waiting_rows = self._waiting_bytes = 0
        self._clear()

    def add(self, step: StepRecord) -> None:
        """Keep a step."""
        self._waiting.append(step)
        self._waiting_rows += sum(len(call.experts) for call in step.calls)
        self._waiting_bytes += sum(_nbytes(call) for call in step.calls)
        if self._waiting_rows >= _FEW_ROWS:
            self._settle()

    @property
    def nbytes(self) -> int:
        """Bytes gathered and waiting."""
        return self._nbytes + self._waiting_bytes

    def take(self) -> Part | None:
        """Empty the buffer into a part; None if there is nothing in it."""
        self._settle()
        if not self._calls:
            return None
        part: Part = {"calls": np.array(self._calls, np.int64)}
        for router in range(self._num_routers):
            part[f"experts.{router}"] = np.empty((0, 1), np.int16)
            part[f"weights.{router}"] = np.empty((0, 1), np.float32)
        for name, many in self._tokens.items():
            part[name] = np.concatenate([np.empty(0, TOKEN_DTYPES[name]), *many])
        for name, many in self._rows.items():
            part[name] = measures.stacked(many, -1 if name.startswith("experts") else 0)
        self._clear()
        return part

    def _clear(self) -> None:
        self._nbytes = 0
        self._part_tokens = 0
        self._calls: list[tuple[int, int, int, int, int]] = []
        self._num_rows = [0] * self._num_routers
        self._rows: dict[str, list[NDArray[Any]]] = {}
        self._tokens: dict[str, list[NDArray[Any]]] = {name: [] for name in TOKEN_DTYPES}

    def _settle(self) -> None:
        """Copy the waiting steps into arrays."""
        calls = [call for step in self._waiting for call in step.calls]
        columns = {
            "experts": _arrays([call.experts for call in calls], torch.int16),
            "weights": _arrays([call.weights for call in calls], torch.float32),
            "scores": _arrays([call.scores for call in calls], self._scores),
            "hidden": _arrays([call.hidden for call in calls], torch.float32),
        }
        number = 0
        for step in self._waiting:
            texts: dict[int, int] = {}
            for call in step.calls:
                num_rows = len(call.experts)
                first = self._first_token(call, step, texts)
                self._calls.append((call.router, self._num_rows[call.router], num_rows, self.num_steps, first))
                self._num_rows[call.router] += num_rows
                for name, arrays in columns.items():
                    array = arrays[number]
                    if array is not None:
                        if name == "experts" and call.is_kept is not None:
                            array = np.where(call.is_kept.cpu().numpy(), array, np.int16(-1))
                        self._rows.setdefault(f"{name}.{call.router}", []).append(array)
                        self._nbytes += array.nbytes
                number += 1
            if not any(_is_of_text(call) and not call.is_encoding for call in step.calls):  # embeddings, no tokens
                self._texts_of[step.forward.past] = self._texts_before(step)
            self.num_steps += 1
        self._waiting = []
        self._waiting_rows = self._waiting_bytes = 0

    def _first_token(self, call: CallRecord, step: StepRecord, texts: dict[int, int]) -> int:
        """Index of the call's first token in the part; -1 where its rows are not tokens of text."""
        ids = call.token_ids
        if ids is None or not _is_of_text(call):
            return -1
        if id(ids) not in texts:
            texts[id(ids)] = self._part_tokens
            self._add_tokens(ids, call.is_padding, *self._place(ids, step, is_encoding=call.is_encoding), step.domain)
        return texts[id(ids)]

    def _place(self, ids: Tensor, step: StepRecord, *, is_encoding: bool) -> tuple[tuple[int, ...], int]:
        """The numbers of the texts of tokens (B, S), and the position of the first token of each."""
        batch, length = ids.shape
        if is_encoding:
            return self._new_numbers(batch), 0
        numbers = self._texts_before(step).numbers
        if len(numbers) != batch:
            numbers = self._new_numbers(batch)
        before = step.forward.num_before or 0
        self._texts_of[step.forward.past] = _Texts(numbers, before + length)
        return numbers, before

    def _texts_before(self, step: StepRecord) -> _Texts:
        """The texts that a step continues; empty where they are not known."""
        numbers, num_tokens = self._texts_of.get(step.forward.past, _Texts((), 0))
        # A cache that has dropped tokens, such as rejected drafts, continues with another text.
        if not step.forward.num_before or step.forward.num_kept < num_tokens or not numbers:
            return _Texts((), 0)
        return _Texts(self._moved(numbers, step.forward.moves), num_tokens)

    def _moved(self, numbers: tuple[int, ...], moves: tuple[Move, ...]) -> tuple[int, ...]:
        """The texts of rows after moves. Of several rows that continue one text, the first keeps its number."""
        rows: Sequence[int] = numbers
        try:
            for move in moves:
                rows = move(rows)
        except (IndexError, RuntimeError, TypeError):  # rows that this recording has not seen
            return ()
        return tuple(
            number if number not in rows[:place] else self._new_numbers(1)[0] for place, number in enumerate(rows)
        )

    def _new_numbers(self, batch: int) -> tuple[int, ...]:
        first = self._num_sequences
        self._num_sequences += batch
        return tuple(range(first, self._num_sequences))

    def _add_tokens(
        self, ids: Tensor, is_padding: Tensor | None, numbers: tuple[int, ...], before: int, domain: int
    ) -> None:
        batch, length = ids.shape
        padding = np.zeros((batch, length), np.uint8) if is_padding is None else is_padding.cpu().numpy()
        found: dict[str, NDArray[Any]] = {
            "token_ids": ids.reshape(-1).cpu().numpy(),
            "sequence": np.repeat(numbers, length),
            "position": np.tile(np.arange(before, before + length), batch),
            "is_padding": padding.reshape(-1),
            "domain": np.full(batch * length, domain),
        }
        for name, array in found.items():
            self._tokens[name].append(array.astype(TOKEN_DTYPES[name]))
            self._nbytes += self._tokens[name][-1].nbytes
        self._part_tokens += batch * length
        self.num_tokens += batch * length


def _is_of_text(call: CallRecord) -> bool:
    """Whether the rows of a call are tokens."""
    return call.token_ids is not None and call.token_ids.numel() == len(call.experts)


def _nbytes(call: CallRecord) -> int:
    return sum(one.nbytes for one in (call.scores, call.experts, call.weights, call.hidden) if one is not None)


def _arrays(tensors: Sequence[Tensor | None], dtype: torch.dtype | None) -> list[NDArray[Any] | None]:
    """Tensors as arrays; those of the same shape, device and dtype are copied together."""
    arrays: list[NDArray[Any] | None] = [None] * len(tensors)
    if dtype is None:
        return arrays
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None:
            alike.setdefault((tensor.shape, tensor.device, tensor.dtype), []).append(place)
    for places in alike.values():
        together = torch.stack([tensors[place] for place in places]).to("cpu", dtype)  # type: ignore[misc]  # sync
        for place, array in zip(places, together.numpy(), strict=True):
            arrays[place] = array
    return arrays
