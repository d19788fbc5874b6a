"""Which experts two domains of a recording choose differently often, and whether chance explains it."""

# E experts, R runs of tokens, K experts per token

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.strategy import check_count, check_number
from transformers_moe_offload.routing.trace_data import RecordedRouting, Rows
from transformers_moe_offload.tracing.trace_file import TraceError

_RUN = 32
"""Tokens of a run. Neighbouring tokens choose alike, so single tokens would seem more evidence than they are: on
tiny-moe the correlation of an expert's choices, means of texts taken out, is 0.10 between neighbours and 0.01 across 32
tokens."""

_FEWEST = 8
"""Observations of a domain. With fewer, the normal distribution is too narrow for their mean."""

Unit = Literal["text", "run"]


@dataclass(frozen=True)
class ExpertDifference:
    """How often one expert is chosen in either domain."""

    router: int
    """As `set_routing` counts them."""
    expert: int
    rate: float
    """Share of the tokens of the first domain that choose it."""
    other_rate: float
    """The same in the other domain."""
    p_value: float
    """How likely a difference as large is by chance anywhere in the table: adjusted for the number of experts
    (Benjamini and Hochberg 1995)."""

    @property
    def difference(self) -> float:
        """Above 0 where the first domain chooses it more often: the risk difference of SteerMoE."""
        return self.rate - self.other_rate


@dataclass(frozen=True)
class ExpertContrast:
    """All experts of a recording, those with the greatest difference between two domains first."""

    domains: tuple[str, str]
    unit: Unit
    """What counted as one observation. A "text" where both domains have enough: then a difference that is significant
    is expected in other texts of these domains, too. Otherwise a "run" of neighbouring tokens: then it is known of
    these texts only, which may differ by what they are about."""
    experts: tuple[ExpertDifference, ...] = field(repr=False)

    def significant(self, level: float = 0.05) -> tuple[ExpertDifference, ...]:
        """Those whose difference chance does not explain; of these a share of at most `level` is expected to be
        wrong."""
        check_number("level", level, above=0)
        if level >= 1:
            raise ConfigError(f"level={level!r} is no level of significance; choose a share above 0 and below 1")
        return tuple(one for one in self.experts if one.p_value <= level)

    def steering(self, promote: int = 8, suppress: int = 8, level: float = 0.05) -> dict[str, dict[int, list[int]]]:
        """Options of strategy `steer` that move a model towards the first domain, and away from the other.

            routing.set_routing(model, "steer", **found.steering())

        The so many experts that the first domain prefers most, and those that the other one does, as far as they are
        significant. Of one router, at most as many are promoted as a token takes there.
        """
        check_count("promote", promote, least=0)
        check_count("suppress", suppress, least=0)
        found = self.significant(level)
        towards = [one for one in found if one.difference > 0]
        away = [one for one in found if one.difference < 0]
        options = {
            "promote": _by_router(towards, promote, self._room),
            "suppress": _by_router(away, suppress, self._left),
        }
        if not any(options.values()):
            raise TraceError(
                f"of {len(self.experts)} experts none differs between {self.domains[0]!r} and {self.domains[1]!r} at "
                f"level {level:g}; record more text of both, or choose a larger level"
            )
        return options

    def _room(self, router: int) -> int:
        """About how many experts a token takes at a router."""
        return round(sum(one.rate for one in self.experts if one.router == router))

    def _left(self, router: int) -> int:
        """How many experts of a router may go, so that a token still finds as many as it takes."""
        return sum(one.router == router for one in self.experts) - self._room(router)


def contrast_of(trace: RecordedRouting, domain: str, other: str) -> ExpertContrast:
    """Compare two domains of a recording, expert by expert, by the means over texts or runs of neighbouring tokens."""
    for name in (domain, other):
        if name not in trace.domains:
            raise ConfigError(
                f"domain {name!r} is not in the trace, which has {', '.join(trace.domains) or 'none'}; set "
                f"recorder.domain while recording"
            )
    if domain == other:
        raise ConfigError(f"{domain!r} is compared with itself; name two domains")
    found: list[tuple[int, int, float, float, float]] = []
    unit: Unit = "text"
    for router, facts in enumerate(trace.routers):
        sides = [_Runs(facts.num_experts) for _ in range(2)]
        for rows in trace.rows(router):
            for side, name in zip(sides, (domain, other), strict=True):
                side.add(rows.at(rows.domain == list(trace.domains).index(name)))
        unit = "text" if all(side.num_texts >= _FEWEST for side in sides) else "run"
        (rate, error), (other_rate, other_error) = (
            side.rates(unit, name) for side, name in zip(sides, (domain, other), strict=True)
        )
        p_values = _two_sided(rate - other_rate, np.hypot(error, other_error))
        found += [
            (facts.router, expert, *values)
            for expert, values in enumerate(zip(rate.tolist(), other_rate.tolist(), p_values, strict=True))
        ]
    adjusted = _adjusted([one[-1] for one in found])
    differences = (ExpertDifference(*one[:-1], p_value) for one, p_value in zip(found, adjusted, strict=True))
    return ExpertContrast((domain, other), unit, tuple(sorted(differences, key=lambda one: -abs(one.difference))))


class _Runs:
    """How often each expert was chosen in each run of tokens."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._counts: dict[tuple[int, int, int], tuple[int, NDArray[np.int64]]] = {}
        """By text, place in it, and turn: tokens, and choices of each expert (E,)."""

    @property
    def num_texts(self) -> int:
        """Texts that have a token here."""
        return len({text for text, *_ in self._counts})

    def add(self, rows: Rows) -> None:
        """Count the choices of some tokens."""
        keys = np.stack([rows.sequence, rows.position // _RUN, rows.turn], axis=1)
        for block in measures.blocks(len(keys), self._num_experts):
            mask = measures.chosen_mask(rows.experts[block], self._num_experts)
            unique, which = np.unique(keys[block], axis=0, return_inverse=True)
            for number, key in enumerate(unique.tolist()):
                is_here = which.reshape(-1) == number
                tokens, counts = self._counts.get(tuple(key), (0, np.zeros(self._num_experts, np.int64)))
                self._counts[tuple(key)] = tokens + int(is_here.sum()), counts + mask[is_here].sum(axis=0)

    def rates(self, unit: Unit, name: str) -> tuple[measures.Floats, measures.Floats]:
        """The share of tokens that choose each expert, and its standard error: (E,) each."""
        if len(self._counts) < _FEWEST:
            raise TraceError(
                f"domain {name!r} has {len(self._counts)} runs of up to {_RUN} neighbouring tokens, and {_FEWEST} are "
                f"needed to tell a difference from chance; record {_RUN * _FEWEST} tokens of it or more"
            )
        tokens = np.array([tokens for tokens, _ in self._counts.values()], np.float64)
        counts = np.stack([counts for _, counts in self._counts.values()])
        if unit == "text":
            _, which = np.unique([text for text, *_ in self._counts], return_inverse=True)
            tokens = np.bincount(which, tokens).astype(np.float64)
            counts = np.stack([np.bincount(which, of_expert) for of_expert in counts.T], axis=1)
        rate = counts.sum(axis=0) / tokens.sum()
        # Of a ratio of sums over observations (Cochran 1977, "Sampling Techniques", section 6.4).
        spread = ((counts - rate * tokens[:, None]) ** 2).sum(axis=0) * len(tokens) / (len(tokens) - 1)
        return rate, np.sqrt(spread) / tokens.sum()


def _two_sided(differences: measures.Floats, errors: measures.Floats) -> list[float]:
    """How likely normal deviates as large are; 1 for no difference at all."""
    pairs: Iterable[tuple[float, float]] = zip(differences.tolist(), errors.tolist(), strict=True)
    return [
        math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(difference == 0)
        for difference, error in pairs
    ]


def _adjusted(p_values: list[float]) -> list[float]:
    """Adjusted for the false discovery rate, in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__, reverse=True)
    adjusted, least = [1.0] * len(p_values), 1.0
    for place, number in enumerate(order):
        least = min(least, p_values[number] * len(p_values) / (len(p_values) - place))
        adjusted[number] = least
    return adjusted


def _by_router(ranked: list[ExpertDifference], most: int, room: Any) -> dict[int, list[int]]:
    """The first `most` of ranked experts, by router, and at most `room(router)` of each."""
    found: dict[int, list[int]] = {}
    for one in ranked:
        if sum(map(len, found.values())) == most:
            break
        if len(found.get(one.router, ())) < room(one.router):
            found.setdefault(one.router, []).append(one.expert)
    return found
