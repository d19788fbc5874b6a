"""What was built, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers_moe_offload.builder.gates import GateReport
from transformers_moe_offload.builder.plan.tensors import Parameters
from transformers_moe_offload.builder.sources import Ancestor


@dataclass(frozen=True)
class CheckReport:
    """Results of the checks of a mixture."""

    identity: float
    """Largest difference from the base model's logits, with copies of its blocks as experts."""
    forced_expert: float
    """Largest difference of every expert alone from the logits of its dense model."""
    was_loaded: bool
    """Whether Transformers has loaded the bytes, too; of large mixtures only names, shapes and conversions are
    tried."""
    similarity: Mapping[str, float]
    """Cosine of each source's blocks with the base model's, the least of three layers."""


@dataclass(frozen=True)
class MoeBuildInfo:
    """A mixture that was built."""

    folder: Path
    container: str
    experts: tuple[str, ...]
    experts_per_token: int
    layers: tuple[int, ...]
    """Layers with experts."""
    dtype: str
    nbytes: int
    """Bytes of all weights."""
    parameters: Parameters
    sources: tuple[Ancestor, ...]
    """Every checkpoint that it was made of, with its commit where there is one."""
    gates: GateReport
    checks: CheckReport
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; nothing of it depends on the machine it was built on."""
        return {
            "container": self.container,
            "experts": list(self.experts),
            "experts_per_token": self.experts_per_token,
            "layers": list(self.layers),
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "parameters": {**asdict(self.parameters), "total": self.parameters.total},
            "sources": [{"name": source.name, "revision": source.revision} for source in self.sources],
            "gates": self.gates.as_dict(),
            "checks": asdict(self.checks),
            "warnings": list(self.warnings),
        }
