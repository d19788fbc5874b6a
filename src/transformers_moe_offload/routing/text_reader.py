"""Follows the texts that a model reads, forward by forward, for strategies that have to know each token's place.

Everything it knows comes from the KV cache and the attention mask that a forward is given (`forward_context.py`). Where
they do not say what was read before, it raises instead of guessing.
"""

# B sequences, S their length in a forward, P columns of a KV cache

from __future__ import annotations

import weakref
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.routing.forward import Forward, Past
from transformers_moe_offload.routing.texts import Prefixes, Texts, texts_of


class _Read:
    """What the rows of a KV cache hold."""

    def __init__(self, count: NDArray[np.int64], prefix: Prefixes) -> None:
        self.count = count
        """(B, P): tokens of the text in all columns up to this one."""
        self.prefix = prefix
        """(B, P)."""


class _Context(Protocol):
    """What is read of a `ForwardContext`."""

    @property
    def forward(self) -> Forward: ...


class TextReader:
    """Finds the texts of forwards. Listens to a context while it has users (`ForwardContext.follow_texts`)."""

    def __init__(self) -> None:
        self.users: set[object] = set()
        self._read: weakref.WeakKeyDictionary[Past, _Read] = weakref.WeakKeyDictionary()
        self._texts: weakref.WeakKeyDictionary[Forward, Texts] = weakref.WeakKeyDictionary()

    def texts(self, forward: Forward, num_rows: int) -> Texts:
        """The texts of a forward whose router is given so many rows; raises `UnsupportedModelError` for unknown
        ones."""
        found = self._texts.get(forward)
        if found is None:
            found = self._texts[forward] = self._find(forward)
        if found.token_ids.size != num_rows:
            raise UnsupportedModelError(
                f"a router was given {num_rows} rows, and the model read {found.token_ids.size} tokens, so their "
                f"places are unknown; leave it out with `layers`"
            )
        return found

    # Called by the forward context.

    def begin(self, context: _Context) -> None:
        """A forward starts; its tokens are not known yet."""

    def end(self, context: _Context) -> None:
        """A forward has succeeded: the next one may go on with its texts."""
        forward = context.forward
        if forward.token_ids is None or forward.has_encoded or forward.is_encoding:
            return
        try:
            texts = self.texts(forward, forward.token_ids.numel())
            before = self._before(forward, len(texts.token_ids))
        except UnsupportedModelError:  # set while a text was being read; a router that has to know it raises
            self._read.pop(forward.past, None)
            return
        count = texts.num_before[:, None] + (~texts.is_padding).cumsum(axis=1)
        self._read[forward.past] = _Read(
            np.concatenate([before.count, count], axis=1), np.concatenate([before.prefix, texts.prefix], axis=1)
        )

    def _find(self, forward: Forward) -> Texts:
        if forward.is_encoding or forward.has_encoded or forward.inputs.get("encoder_outputs") is not None:
            raise UnsupportedModelError(
                "a decoder's text depends on what its encoder has read, and is not known by its own tokens; replay "
                "models that have no encoder"
            )
        if forward.token_ids is None:
            raise UnsupportedModelError(
                "the model was given embeddings, so the tokens that are read are unknown; pass input_ids"
            )
        ids = forward.token_ids.cpu().numpy()  # sync: device -> host
        is_padding = None if forward.is_padding is None else forward.is_padding.cpu().numpy()
        before = self._before(forward, len(ids))
        if not before.count.shape[1]:
            return texts_of(ids, is_padding)
        return texts_of(ids, is_padding, before.count[:, -1], before.prefix[:, -1])

    def _before(self, forward: Forward, batch: int) -> _Read:
        """What the rows of a forward's KV cache hold at its beginning."""
        num_before = forward.num_before
        if num_before == 0:
            return _Read(np.empty((batch, 0), np.int64), np.empty((batch, 0), np.uint64))
        read = self._read.get(forward.past)
        if read is None or num_before is None or min(read.count.shape[1], forward.num_kept) < num_before:
            raise UnsupportedModelError(
                f"the KV cache holds {'some' if num_before is None else num_before} tokens of each text that were read "
                f"before, and not under this strategy, so they are unknown; set it before the prompt is read"
            )
        rows = list(range(len(read.count)))
        try:
            for move in forward.moves:
                rows = move(rows)
        except (IndexError, RuntimeError, TypeError):
            rows = []
        if len(rows) != batch:
            raise UnsupportedModelError(
                f"the KV cache holds {len(rows)} texts, and the model reads tokens of {batch}; read each text from its "
                f"beginning"
            )
        return _Read(read.count[rows, :num_before], read.prefix[rows, :num_before])
