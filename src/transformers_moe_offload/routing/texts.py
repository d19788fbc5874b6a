"""Which text a token is of: a number for it and all tokens before it, the same wherever the text is read.

Two texts have the same prefixes for as long as they have the same tokens, in any batch, with any padding, read at once,
in chunks or token by token. So what was recorded of a text is found again by its prefixes.
"""

# B sequences, S their length in this forward

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Prefix = np.uint64
Prefixes = NDArray[np.uint64]

EMPTY = Prefix(0)
"""The prefix of no tokens."""

_BASE = Prefix(0x9E3779B97F4A7C15)
"""An odd number, so that its powers modulo 2**64 do not become zero (2**64 divided by the golden ratio)."""


@dataclass(frozen=True, eq=False)
class Texts:
    """The tokens of one forward, each with its place in its text. Padding is no token of a text."""

    token_ids: NDArray[np.int64]
    """(B, S)."""
    position: NDArray[np.int64]
    """(B, S): how many tokens of the text come before; -1 at padding."""
    prefix: Prefixes
    """(B, S): of the text up to this token; at padding, up to the token before."""
    num_before: NDArray[np.int64]
    """(B,): how many tokens of each text earlier forwards have read."""
    prefix_before: Prefixes
    """(B,): of those."""

    @property
    def is_padding(self) -> NDArray[np.bool_]:
        """(B, S)."""
        return self.position < 0


def texts_of(
    token_ids: NDArray[np.int64],
    is_padding: NDArray[np.bool_] | None = None,
    num_before: NDArray[np.int64] | None = None,
    prefix_before: Prefixes | None = None,
) -> Texts:
    """Texts that go on with these tokens (B, S); without `num_before` (B,) and `prefix_before` (B,), new ones."""
    batch = len(token_ids)
    before = np.zeros(batch, np.int64) if num_before is None else num_before
    prefix = np.full(batch, EMPTY) if prefix_before is None else prefix_before
    is_token = np.ones(token_ids.shape, np.bool_) if is_padding is None else ~is_padding
    count = before[:, None] + is_token.cumsum(axis=1)  # tokens up to and including this one
    terms = np.where(is_token, _mixed(token_ids) * _powers(int(count.max(initial=0)))[count], EMPTY)
    position = np.where(is_token, count - 1, -1)
    return Texts(token_ids, position, prefix[:, None] + terms.cumsum(axis=1, dtype=np.uint64), before, prefix)


def _powers(most: int) -> Prefixes:
    """Powers of the base from 0 to `most`, modulo 2**64."""
    powers = np.full(most + 1, _BASE)
    powers[0] = 1
    return powers.cumprod(dtype=np.uint64)


def _mixed(token_ids: NDArray[np.int64]) -> Prefixes:
    """Spread token ids over 64 bits (the finaliser of SplitMix64, Steele et al. 2014); arrays of integers wrap."""
    x = token_ids.astype(np.uint64) + _BASE
    x = (x ^ (x >> Prefix(30))) * Prefix(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> Prefix(27))) * Prefix(0x94D049BB133111EB)
    return x ^ (x >> Prefix(31))
