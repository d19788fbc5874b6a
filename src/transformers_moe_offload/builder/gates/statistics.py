"""The statistics behind ridge gates, in a file, so that an expert can be added with its own texts alone.

By layer: the second moment of the hidden states (its lower triangle), the target of each expert's row, and the sample
that entropies are measured on. Size: about 2 H^2 bytes a layer.
"""

# E experts, H hidden, N sampled tokens

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformers_moe_offload.builder.gates.rows import SAMPLE_DTYPE, Scores
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.tensor_files.writer import SafetensorsWriter

STATISTICS_NAME = "gate_statistics.safetensors"
"""Name of the file beside a model."""

_METADATA_KEY = "gate_statistics"


@dataclass(frozen=True, kw_only=True)
class About:
    """The experts, layers, model and gate that the statistics are of."""

    experts: tuple[str, ...]
    tokens: tuple[int, ...]
    """By expert: how many of its tokens were counted."""
    sampled: int
    """N, in each layer."""
    layers: tuple[int, ...]
    hidden_size: int
    base: str
    """The model whose hidden states they are."""
    scores: Scores
    """How its routers turn logits into scores."""
    gate: Gate

    def __post_init__(self) -> None:
        for name in ("experts", "tokens", "layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer."""

    second_moment: Tensor
    """(H, H) float64."""
    targets: Tensor
    """(E, H) float64."""
    sample: Tensor
    """(N, H) bfloat16."""
    home: Tensor
    """(N,) int64."""

    def with_expert(self, other: LayerStatistics) -> LayerStatistics:
        """These statistics and those of one more expert, `other` (E = 1)."""
        return LayerStatistics(
            self.second_moment + other.second_moment,
            torch.cat([self.targets, other.targets]),
            torch.cat([self.sample, other.sample]),
            torch.cat([self.home, other.home + len(self.targets)]),
        )

    def without_expert(self, expert: int) -> LayerStatistics:
        """These statistics without one expert; its texts remain in the second moment."""
        kept = self.home != expert
        home = self.home[kept]
        return LayerStatistics(
            self.second_moment,
            torch.cat([self.targets[:expert], self.targets[expert + 1 :]]),
            self.sample[kept],
            home - (home > expert).long(),
        )


class RidgeStatistics:
    """A file of statistics, of which one layer is read at a time."""

    def __init__(self, path: Path | str) -> None:
        """Open the file; raises `CheckpointError` if it holds no gate statistics."""
        self.path = path = Path(path).absolute()
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY)
            if text is None:
                raise CheckpointError(f"{path} holds no gate statistics; they are written by gate.mode: ridge")
            self.about = _about(json.loads(text), path)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CheckpointError(f"cannot read gate statistics from {path}: {error}") from error

    def layer(self, layer: int) -> LayerStatistics:
        """The statistics of one layer."""
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {name: file.get_tensor(f"layers.{layer}.{name}") for name in _NAMES}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} has no statistics of layer {layer}: {error}") from error
        return LayerStatistics(
            _unpacked(found["second_moment"], self.about.hidden_size),
            found["targets"].double(),
            found["sample"],
            found["home"].long(),
        )


class StatisticsWriter(SafetensorsWriter):
    """Writes a file of statistics layer by layer, in a `with` block; whole or not at all."""

    def __init__(self, path: Path, about: About) -> None:
        super().__init__(path, _specs(about), {_METADATA_KEY: json.dumps(asdict(about))})

    def write_layer(self, layer: int, statistics: LayerStatistics) -> None:
        """Write the statistics of one layer."""
        for name, values in (
            ("second_moment", _packed(statistics.second_moment)),
            ("targets", statistics.targets.float()),
            ("home", statistics.home.int()),
            ("sample", statistics.sample),
        ):
            self.write(f"layers.{layer}.{name}", values)


_NAMES = ("second_moment", "targets", "home", "sample")


def _specs(about: About) -> Sequence[FieldSpec]:
    """The tensors of the file, wider dtypes first."""
    size, sampled = about.hidden_size, about.sampled
    shapes = {
        "second_moment": ((size * (size + 1) // 2,), "float32"),
        "targets": ((len(about.experts), size), "float32"),
        "home": ((sampled,), "int32"),
        "sample": ((sampled, size), dtype_name(SAMPLE_DTYPE)),
    }
    return [FieldSpec(f"layers.{layer}.{name}", *shapes[name]) for name in _NAMES for layer in about.layers]


def _packed(symmetric: Tensor) -> Tensor:
    """The lower triangle, row by row: (H, H) float64 -> (H (H + 1) / 2,) float32."""
    return symmetric.float()[_lower(len(symmetric))]


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """The reverse of `_packed`."""
    lower = torch.zeros(size, size, dtype=torch.float64)
    lower[_lower(size)] = packed.double()
    return lower + lower.tril(-1).T


def _lower(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _about(values: object, path: Path) -> About:
    names = {field.name for field in fields(About)}
    if not isinstance(values, dict) or set(values) != names:
        raise CheckpointError(f"{path} has gate statistics of another version; build the model again")
    try:
        return About(**{**values, "gate": Gate(**values["gate"])})
    except (TypeError, RecipeError) as error:
        raise CheckpointError(f"{path} has gate statistics of another version; build the model again") from error
