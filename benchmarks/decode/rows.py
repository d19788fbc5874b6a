"""What is compared: each row loads the same checkpoint in another way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Transformers' own experts implementations (`integrations/moe.py`, 5.23); the best one of a kind counts."""

BUDGETS = (10, 25, 50, 100)
"""Percent of all experts."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of running the model."""

    kind: Literal["plain", "accelerate", "accelerate-cpu", "ours"]
    """All in RAM; experts modules on disk by device map; the same in RAM, brought to the CPU that computes; experts
    offloaded by this package."""
    implementation: str | None = None
    """Transformers' experts implementation, for all kinds but `ours`."""
    budget_percent: int | None = None
    """Of the experts' bytes, for `ours`; of the experts modules that stay in RAM, for `accelerate`."""
    arithmetic: str | None = None
    is_copied: bool = False
    """Experts are copied into slots even where they could be used in the page cache."""

    @property
    def name(self) -> str:
        """How the row is called in tables and on the command line."""
        if self.kind == "ours":
            return f"ours {self.budget_percent}% {self.arithmetic}{' copied' if self.is_copied else ''}"
        kept = f" {self.budget_percent}%" if self.budget_percent else ""
        return f"{self.kind} {self.implementation}{kept}"


def all_rows() -> list[Row]:
    """Every row, in the order of the table."""
    return [
        *(Row(kind="plain", implementation=name) for name in IMPLEMENTATIONS),
        *(Row(kind="accelerate", implementation=name) for name in IMPLEMENTATIONS),
        Row(kind="accelerate-cpu", implementation="grouped_mm"),
        *(
            Row(kind="ours", budget_percent=percent, arithmetic="fast", is_copied=is_copied)
            for is_copied in (False, True)
            for percent in BUDGETS
        ),
        Row(kind="ours", budget_percent=100, arithmetic="exact"),
    ]


QUICK = (
    "plain eager",
    "accelerate eager",
    "accelerate-cpu grouped_mm",
    "ours 25% fast",
    "ours 100% fast",
    "ours 25% fast copied",
    "ours 100% exact",
)
"""One row of every kind."""
