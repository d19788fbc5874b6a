"""Measure a model at several strengths of cache-aware routing, and recommend one."""

# S tokens of a text

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_moe_offload.config import CacheAwareConfig, OffloadConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.hf.model.handle import runtime_of
from transformers_moe_offload.routing.meter.figures import Figures, figures_of
from transformers_moe_offload.routing.meter.journal import Journal
from transformers_moe_offload.routing.meter.steps import Meter, Steps
from transformers_moe_offload.routing.meter.windows import most_positions, windows_of
from transformers_moe_offload.routing.sites import unwrapped
from transformers_moe_offload.routing.strategies.cache_aware import CacheAware
from transformers_moe_offload.routing.strategy import check_count, check_number
from transformers_moe_offload.routing.switching import set_routing

STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
MAX_LOSS = 0.01
WINDOW, TOKENS = 256, 2048

VERSION = 1
"""Of the file that measurements are kept in."""


@dataclass(frozen=True)
class Tradeoff:
    """What each strength costs and gains."""

    figures: tuple[Figures, ...]
    """By strength, in ascending order; 0 is the first."""
    num_tokens: int
    """Tokens that were predicted at each strength."""
    max_loss: float
    config: OffloadConfig
    """The config of the model."""
    protect: int

    @property
    def recommended(self) -> Figures:
        """The largest strength whose loss is within `max_loss`; 0 is, always."""
        return [one for one in self.figures if one.strength == 0 or one.loss.value <= self.max_loss][-1]

    @property
    def line(self) -> str:
        """The config with the recommended strength, as code."""
        changed = {name: value for name, value in self.config.to_diff_dict().items() if name != "quant_method"}
        changed.pop("cache_aware", None)
        if self.recommended.strength:
            strength: Any = self.recommended.strength
            changed["cache_aware"] = strength if self.protect == 1 else {"strength": strength, "protect": self.protect}
        return f"OffloadConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "tokens": self.num_tokens,
            "max_loss": self.max_loss,
            "protect": self.protect,
            "config": self.config.to_dict(),
            "figures": [one.to_dict() for one in self.figures],
            "recommended": self.recommended.strength,
            "line": self.line,
        }


def tradeoff(
    model: Any,
    texts: Sequence[Sequence[int] | Tensor],
    strengths: Sequence[float] = STRENGTHS,
    *,
    protect: int = 1,
    max_loss: float = MAX_LOSS,
    tokens: int = TOKENS,
    window: int = WINDOW,
    resume: str | os.PathLike[str] | None = None,
    before_step: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tradeoff:
    """Read texts token by token at each strength of `cache_aware`, and compare hits, speed and predictions.

    `texts` are token ids, (S,) each, which the model was not trained on. Of these `tokens` are predicted, in windows of
    at most `window`; a window is read at all strengths, one after the other, each from an empty cache and without
    context. `max_loss` is the most by which the perplexity may rise for a recommendation: 0.01 is 1 %.

    With `resume` what has been measured is kept in that file, and a later call goes on from there. `before_step` is
    called before every forward, while the clock stands still, and `progress` after it with the steps that are done and
    all of them. The model's own strategies are back in place afterwards; its cache is as the last step left it.
    """
    base: Any = unwrapped(model)
    runtime = runtime_of(base)
    strategies = {float(one): CacheAware(strength=one, protect=protect) for one in sorted({0, *_checked(strengths)})}
    check_number("max_loss", max_loss, least=0)
    check_count("tokens", tokens)
    check_count("window", window, least=2)
    windows = windows_of(texts, min(window, most_positions(base) or window), tokens)
    facts = {
        "meter": VERSION,
        "model": Path(base.config.name_or_path).name,
        "config": runtime.config.to_dict() | {"cache_aware": None},
        "slots": runtime.plan.num_slots,
        "protect": protect,
        "texts": hashlib.sha256(b"|".join(one.numpy().tobytes() for one in windows)).hexdigest(),
    }
    journal = Journal(None if resume is None else Path(resume), facts)
    num_steps = sum(len(one) - 1 for one in windows)
    advance = _Progress(progress, num_steps * len(strategies))
    was_training = base.training
    base.eval()
    try:
        meter = Meter(model, before_step, advance)
        found: dict[float, list[Steps]] = {strength: [] for strength in strategies}
        for number, ids in enumerate(windows):
            for strength, steps in _at_all(model, meter, journal, number, ids, strategies, advance).items():
                found[strength].append(steps)
    finally:
        base.train(was_training)
    return Tradeoff(tuple(figures_of(found)), num_steps, max_loss, runtime.config, protect)


def _checked(strengths: Sequence[float]) -> list[float]:
    """The strengths; raises `ConfigError` for none, and for one that cannot be."""
    if not strengths:
        raise ConfigError("strengths names none to measure; 0.1 and 0.3 are a good start")
    return [CacheAwareConfig(strength=one).strength for one in strengths]


class _Progress:
    """Counts steps."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report = report
        self._done, self._total = 0, total

    def __call__(self, steps: int = 1) -> None:
        self._done = min(self._done + steps, self._total)
        self._report(self._done, self._total)


def _at_all(
    model: Any,
    meter: Meter,
    journal: Journal,
    number: int,
    ids: Tensor,
    strategies: dict[float, CacheAware],
    advance: _Progress,
) -> dict[float, Steps]:
    """The steps of a window at each strength: those that were kept, and those that are measured now."""
    found = {strength: journal.get(number, strength) for strength in strategies}
    kept = {
        strength: steps for strength, steps in found.items() if steps is not None and len(steps.nats) == len(ids) - 1
    }
    advance((len(ids) - 1) * len(kept))
    reference: Tensor | None = None
    for strength, strategy in strategies.items():
        is_needed = strength not in kept or (strength == 0 and len(kept) < len(strategies))
        if not is_needed:
            continue
        with set_routing(model, strategy):
            steps, predictions = meter.read(ids, reference)
        if strength == 0:
            reference = predictions
        if strength not in kept:
            journal.add(number, strength, steps)
            kept[strength] = steps
    return kept
