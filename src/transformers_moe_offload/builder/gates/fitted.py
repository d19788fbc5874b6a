"""Rows of one model's routers, layer by layer: scaled, reported, and refused where they cannot tell experts apart."""

# E experts, H hidden, N sampled tokens

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.builder.gates.rows import READ, Scores, entropy, scale_for
from transformers_moe_offload.builder.gates.statistics import RidgeStatistics
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.errors import RecipeError

logger = logging.getLogger(__name__)

WORST_CONDITION = 1e6
"""Above it, float32 rows (7 digits) cannot tell some pair of experts apart."""

SUSPICIOUS_CONDITION = 30.0
"""Above it, some experts are told apart 30 times worse than others; texts of clearly different kinds stay below 10 (the
three domains of examples/models: 1 to 4 with every mode, 2026-11)."""


@dataclass(frozen=True)
class LayerReport:
    """The router of one decoder layer."""

    layer: int
    condition: float
    """The condition number of its rows without their mean: how much better it separates the experts it separates best
    than those it separates worst. Infinite where it cannot separate some."""
    scale: float
    """Factor on the rows as the mode computes them."""
    entropy: float | None = None
    """Mean of the routing weights' entropy before the top k are taken, as a share of its maximum; on a sample."""
    sent_home: tuple[float, ...] | None = None
    """By expert: the share of its own tokens, in a sample, for which it is the first choice."""


@dataclass(frozen=True)
class GateReport:
    """The routers of a model."""

    mode: str
    experts: tuple[str, ...]
    tokens: tuple[int, ...]
    """By expert: how many tokens its gate was calibrated with."""
    layers: tuple[LayerReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Gates:
    """Programmed routers."""

    rows: Mapping[int, Tensor]
    """By layer: (E, H) float32."""
    report: GateReport
    statistics: RidgeStatistics | None = None
    """The statistics that ridge gates were computed from, if they were to be kept."""


def unscaled_gates(gate: Gate, names: Sequence[str], rows: Mapping[int, Tensor], scores: Scores) -> Gates:
    """Gates with these rows by layer, (E, H), as they are."""
    fitted = Fitted(replace(gate, scale=1.0), names, (), scores)
    for layer in sorted(rows):
        fitted.add(layer, rows[layer])
    return fitted.gates()


class Fitted:
    """Takes the rows of one layer after the other."""

    def __init__(self, gate: Gate, names: Sequence[str], tokens: Sequence[int], scores: Scores) -> None:
        self._gate, self._names, self._tokens, self._scores = gate, tuple(names), tuple(tokens), scores
        self._rows: dict[int, Tensor] = {}
        self._reports: list[LayerReport] = []
        self._off_target: list[int] = []

    def add(self, layer: int, rows: Tensor, sample: Tensor | None = None, home: Tensor | None = None) -> None:
        """Add one layer's rows (E, H), not scaled yet; with sample (N, H) and home (N,) if there is a sample."""
        scale: float | None = 1.0
        if not isinstance(self._gate.scale, str):
            scale = float(self._gate.scale)
        elif self._gate.mode in READ:
            assert sample is not None
            scale = scale_for(sample.double() @ rows.double().T, self._gate.target_entropy, self._scores)
        if scale is None:
            self._off_target.append(layer)
            scale = 1.0
        self._rows[layer] = (rows.double() * scale).float()
        self._reports.append(_layer_report(layer, self._rows[layer], scale, sample, home, self._scores))

    def gates(self) -> Gates:
        """The rows of all layers; raises `RecipeError` for rows that cannot work."""
        if self._gate.mode in READ and self._gate.mode != "base_first":
            _expect_rows_apart(self._rows, self._names)
        if self._off_target:
            raise RecipeError(
                f"no scale gives routing weights of layers {', '.join(map(str, self._off_target))} an entropy of "
                f"{self._gate.target_entropy}; raise gate.target_entropy, or set gate.scale to a number"
            )
        return Gates(self._rows, GateReport(self._gate.mode, self._names, self._tokens, tuple(self._reports)))


def _condition(rows: Tensor) -> float:
    """Condition number of rows (E, H) without their mean, to which softmax is invariant."""
    if len(rows) < 2:
        return 1.0
    values = torch.linalg.svdvals((rows - rows.mean(0, keepdim=True)).double())[: len(rows) - 1]
    least = values[-1].item()
    return values[0].item() / least if least > 0 else float("inf")


def _sent_home(logits: Tensor, home: Tensor, num_experts: int) -> tuple[float, ...]:
    """Share of each expert's tokens that choose it first: logits (N, E), home (N,) int64; 0 where it has none."""
    is_home = (logits.argmax(-1) == home).double()
    counts = torch.bincount(home, minlength=num_experts).clamp(min=1)
    return tuple((torch.bincount(home, weights=is_home, minlength=num_experts) / counts).tolist())


def _layer_report(
    layer: int, rows: Tensor, scale: float, sample: Tensor | None, home: Tensor | None, scores: Scores
) -> LayerReport:
    """Figures of one layer: rows (E, H) as they are written, sample (N, H), home (N,) int64."""
    report = LayerReport(layer, _condition(rows), scale)
    if sample is None or home is None or not len(sample):
        return report
    logits = sample.float() @ rows.T
    mean_entropy = entropy(logits, scores).mean().item()
    return replace(report, entropy=mean_entropy, sent_home=_sent_home(logits, home, len(rows)))


def _expect_rows_apart(rows: Mapping[int, Tensor], names: Sequence[str]) -> None:
    """Refuse rows (E, H), at any scale, that leave an expert out or cannot tell two apart."""
    for layer, of_layer in rows.items():
        lengths = of_layer.norm(dim=-1)
        if not torch.isfinite(lengths).all():
            raise RecipeError(
                f"the gate of expert {names[int((~torch.isfinite(lengths)).nonzero()[0])]!r} in layer {layer} is not "
                f"finite; are the base model's weights sound?"
            )
        short = (lengths <= 1e-6 * lengths.max()).nonzero()
        if len(short):
            raise RecipeError(
                f"the gate of expert {names[int(short[0])]!r} in layer {layer} comes out as zero: its negative_prompts "
                f"take away what its texts give, or its texts are like the mean of all; change one of them"
            )
    conditions = {layer: _condition(of_layer) for layer, of_layer in rows.items()}
    degenerate = [layer for layer, value in conditions.items() if value > WORST_CONDITION]
    if degenerate:
        raise RecipeError(
            f"gates of {_layers(degenerate)} cannot tell some experts apart (condition number "
            f"{max(conditions[layer] for layer in degenerate):.3g}, the most is {WORST_CONDITION:.0e}); give experts "
            f"texts that differ, or set gate.mode to random, noise or gateless"
        )
    suspicious = [layer for layer, value in conditions.items() if value > SUSPICIOUS_CONDITION]
    if suspicious:
        logger.warning(
            "Gates of %s hardly tell some experts apart (condition number up to %.3g); some experts will be used "
            "little. Do their texts differ?",
            _layers(suspicious),
            max(conditions[layer] for layer in suspicious),
        )


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
