"""Rows of one model's routers, layer by layer: scaled, reported, and refused where they cannot tell experts apart."""

# E experts, H hidden, N sampled tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from transformers_moe_offload.builder.gates.report import GateReport, LayerReport, expect_rows_apart, layer_report
from transformers_moe_offload.builder.gates.rows import READ
from transformers_moe_offload.builder.gates.scale import Scores, scale_for
from transformers_moe_offload.builder.gates.statistics import RidgeStatistics
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.errors import RecipeError


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
        self._reports.append(layer_report(layer, self._rows[layer], scale, sample, home, self._scores))

    def gates(self, statistics: RidgeStatistics | None = None) -> Gates:
        """The rows of all layers; raises `RecipeError` for rows that cannot work."""
        if self._gate.mode in READ and self._gate.mode != "base_first":
            expect_rows_apart(self._rows, self._names)
        if self._off_target:
            raise RecipeError(
                f"no scale gives routing weights of layers {', '.join(map(str, self._off_target))} an entropy of "
                f"{self._gate.target_entropy}; raise gate.target_entropy, or set gate.scale to a number"
            )
        return Gates(
            self._rows, GateReport(self._gate.mode, self._names, self._tokens, tuple(self._reports)), statistics
        )
