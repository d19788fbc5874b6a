"""A setting that may be recommended, what is predicted of it, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from transformers_moe_offload.config import HqqFormat, OffloadConfig
from transformers_moe_offload.routing.meter import Interval
from transformers_moe_offload.tuning.other_programs import LITTLE
from transformers_moe_offload.tuning.prediction import Prediction

WITHIN = 0.15
"""Share of the measured speed by which a prediction may be off."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A config, and how its results differ from the model's."""

    config: OffloadConfig
    loss: Interval | None = None
    """By what share the perplexity is higher; None where results are the model's own."""

    @property
    def line(self) -> str:
        """The config as code."""
        return line_of(self.config)

    @property
    def format(self) -> str:
        """How experts are stored, as it is typed: `4x64`."""
        experts = self.config.experts
        return f"{experts.nbits}x{experts.group_size}" if isinstance(experts, HqqFormat) else "as stored"

    @property
    def prefetch(self) -> str:
        """The predictor's name."""
        return "none" if self.config.prefetch is None else self.config.prefetch.predictor

    @property
    def strength(self) -> float:
        """Of cache-aware routing."""
        return 0.0 if self.config.cache_aware is None else self.config.cache_aware.strength


def line_of(config: OffloadConfig) -> str:
    """What differs from the defaults, as code that makes it; formats need `HqqFormat`."""
    changed: dict[str, Any] = {name: value for name, value in config.to_diff_dict().items() if name != "quant_method"}
    if config.prefetch is not None:
        changed["prefetch"] = _less_defaults(config.prefetch, "predictor")
    if config.cache_aware is not None and config.cache_aware.protect == 1:
        changed["cache_aware"] = config.cache_aware.strength
    written = {name: repr(value) for name, value in changed.items()}
    if isinstance(config.experts, HqqFormat):
        values = _less_defaults(config.experts, "nbits", "group_size")
        written["experts"] = f"HqqFormat({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    return f"OffloadConfig({', '.join(f'{name}={value}' for name, value in written.items())})"


def _less_defaults(config: Any, *kept: str) -> dict[str, Any]:
    """The fields of a config that are kept, or differ from the defaults."""
    default = type(config)()
    return {name: value for name, value in asdict(config).items() if name in kept or value != getattr(default, name)}


class Measured(NamedTuple):
    """The speed of some runs."""

    tokens_per_s: float
    """With the time that each step takes in most of the runs: the median of them."""
    runs: tuple[float, ...]
    """Of each run, hold-ups included."""
    other_cores: float
    """Cores that other programs kept busy meanwhile."""

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]], other_cores: float) -> Measured:
        """From the seconds of each step in each run."""
        typical = [median(step) for step in zip(*runs, strict=True)]
        return cls(len(typical) / sum(typical), tuple(len(run) / sum(run) for run in runs), other_cores)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A setting, and what is known of its speed."""

    setting: Setting
    num_slots: int
    ranked: Prediction
    """On the trace, or on the text."""
    predicted: Prediction
    """On the text that it is checked with: the same unless there is a trace."""
    measured: Measured | None = None
    """None if it was not run."""

    @property
    def measured_tokens_per_s(self) -> float | None:
        """None if it was not run."""
        return None if self.measured is None else self.measured.tokens_per_s

    @property
    def error(self) -> float | None:
        """By what share of the measured speed the predicted one is higher; negative if it is lower."""
        return None if self.measured is None else self.predicted.tokens_per_s / self.measured.tokens_per_s - 1

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        setting = self.setting
        return {
            "line": setting.line,
            "config": setting.config.to_dict(),
            "slots": self.num_slots,
            "loss": None if setting.loss is None else list(setting.loss),
            "hit_rate": self.ranked.hit_rate,
            "misses_per_token": self.ranked.misses / self.ranked.steps,
            "ranked_by_tokens_per_s": self.ranked.tokens_per_s,
            "predicted_tokens_per_s": self.predicted.tokens_per_s,
            "measured_tokens_per_s": self.measured_tokens_per_s,
            "runs_tokens_per_s": [] if self.measured is None else list(self.measured.runs),
            "other_cores": None if self.measured is None else self.measured.other_cores,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was predicted and measured, and the setting that it recommends."""

    candidates: tuple[Candidate, ...]
    """Those that were compared, the fastest by prediction first."""
    ram_bytes: int
    max_loss: float
    tokens: int
    """Read in each run."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    other_cores: float = 0.0
    """Cores that other programs kept busy while the model's steps were timed."""

    @property
    def checked(self) -> tuple[Candidate, ...]:
        """Those that were run."""
        return tuple(one for one in self.candidates if one.measured is not None)

    @property
    def best(self) -> Candidate:
        """The fastest of those that were run, as measured."""
        return max(self.checked, key=lambda one: one.measured_tokens_per_s or 0.0)

    @property
    def line(self) -> str:
        """The recommended config, as code."""
        return self.best.setting.line

    @property
    def is_within(self) -> bool:
        """Whether the recommended setting's prediction was within 15 % of what was measured."""
        return abs(self.best.error or 0.0) <= WITHIN

    @property
    def disturbed_by(self) -> float:
        """Cores that other programs kept busy, while steps were timed or while the recommended setting was run; 0 for
        as little as there always is."""
        assert self.best.measured is not None
        most = max(self.other_cores, self.best.measured.other_cores)
        return most if most > LITTLE else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "ram_bytes": self.ram_bytes,
            "other_cores": self.other_cores,
            "max_loss": self.max_loss,
            "tokens": self.tokens,
            "notes": list(self.notes),
            "candidates": [one.to_dict() for one in self.candidates],
            "line": self.line,
            "predicted_tokens_per_s": self.best.predicted.tokens_per_s,
            "measured_tokens_per_s": self.best.measured_tokens_per_s,
            "is_within_15_percent": self.is_within,
        }
