"""Figures of each strength with their intervals, from steps: a bootstrap over blocks of tokens.

Tokens that follow one another are alike in loss and in hits, so whole blocks are drawn (Kuensch 1989, "The jackknife
and the bootstrap for general stationary observations"). The same blocks are drawn for all strengths, which makes
comparisons far surer than the figures themselves.
"""

# N tokens, B blocks, R resamples, F fields of `Steps`

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.routing.meter.steps import Steps

MOST_IN_BLOCK = 32
"""Tokens of a block: several times the distance over which experts repeat from token to token."""
LEAST_BLOCKS = 20
"""With fewer the tails of the bootstrap mean nothing; short texts have shorter blocks instead."""
RESAMPLES = 2000
LEVEL = 95
"""Percent of the resamples within an interval."""
SEED = 0


class Interval(NamedTuple):
    """A figure, and the interval that most resamples are in."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """One strength, compared with strength 0 on the same tokens."""

    strength: float
    hit_rate: Interval
    """Share of the experts asked for that were resident."""
    misses: Interval
    """Experts that were not, as a share of those at strength 0."""
    bytes_per_token: Interval
    """Of experts that had to be loaded."""
    tokens_per_s: Interval
    speed: Interval
    """Tokens per second, over those at strength 0."""
    nats: Interval
    """Negative log-likelihood of a token."""
    loss: Interval
    """By what share the perplexity is higher than at strength 0."""
    kl: Interval
    """Divergence of the predictions from those at strength 0, nats a token."""
    agreement: Interval
    """Share of the tokens for which the likeliest next token is that of strength 0."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: intervals as `[value, low, high]`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def figures_of(steps: Mapping[float, Sequence[Steps]]) -> list[Figures]:
    """Figures by strength, in ascending order. `steps` are those of each window, 0 among the strengths."""
    num_tokens = sum(len(window.nats) for window in steps[0])
    in_block = max(1, min(MOST_IN_BLOCK, num_tokens // LEAST_BLOCKS))
    blocks = {strength: _blocks(windows, in_block) for strength, windows in steps.items()}
    num_blocks = len(blocks[0])
    drawn = np.random.default_rng(SEED).multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), RESAMPLES)
    weights = np.concatenate([np.ones((1, num_blocks)), drawn])  # the first row is what was measured
    sums = {strength: _Sums(weights @ rows) for strength, rows in blocks.items()}
    return [_figures(strength, sums[strength], sums[0]) for strength in sorted(sums)]


class _Sums:
    """Sums over the tokens of each resample, (1 + R,) each."""

    def __init__(self, sums: NDArray[np.float64]) -> None:
        self.tokens, *fields = sums.T
        self.of = Steps(*fields)

    def mean(self, field: str) -> NDArray[np.float64]:
        """A field, by token."""
        found: NDArray[np.float64] = getattr(self.of, field) / self.tokens
        return found


def _figures(strength: float, ours: _Sums, own: _Sums) -> Figures:
    misses, own_misses = ours.of.asked - ours.of.hits, own.of.asked - own.of.hits
    return Figures(
        strength,
        hit_rate=_interval(ours.of.hits / np.maximum(ours.of.asked, 1)),
        misses=_interval(np.where(own_misses > 0, misses / np.maximum(own_misses, 1), 1.0)),
        bytes_per_token=_interval(ours.mean("nbytes")),
        tokens_per_s=_interval(1 / ours.mean("seconds")),
        speed=_interval(own.mean("seconds") / ours.mean("seconds")),
        nats=_interval(ours.mean("nats")),
        loss=_interval(np.expm1(ours.mean("nats") - own.mean("nats"))),
        kl=_interval(ours.mean("kl")),
        agreement=_interval(ours.mean("agrees")),
    )


def _interval(values: NDArray[np.float64]) -> Interval:
    """What was measured, and where most resamples are: values (1 + R,)."""
    low, high = np.percentile(values[1:], [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Interval(float(values[0]), float(low), float(high))


def _blocks(windows: Sequence[Steps], in_block: int) -> NDArray[np.float64]:
    """Sums over the tokens of each block, which lies within one window: (B, 1 + F), first the number of tokens."""
    found = []
    for window in windows:
        rows = np.stack([np.ones_like(window.nats), *window], axis=1)
        starts = np.arange(0, len(rows), in_block)
        found.append(np.add.reduceat(rows, starts, axis=0))
    return np.concatenate(found)
