"""What a sweep has found, and which gate it recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class SweepRow:
    """One gate on held-out text."""

    name: str
    bits_per_byte: Mapping[str, float]
    """Bits per byte of text, by domain."""
    sent_home: Mapping[int, float]
    """By layer: the share of tokens whose first choice is their domain's expert, a mean over the domains that have one;
    empty if none has."""
    entropy: Mapping[int, float]
    """By layer: entropy of the routing weights before the top k are taken, as a share of its maximum."""

    @property
    def mean_bits_per_byte(self) -> float:
        """The mean over domains, each with the same weight."""
        return fmean(self.bits_per_byte.values())

    @property
    def best_layer(self) -> tuple[int, float] | None:
        """The layer that sends most tokens home, and what share."""
        return max(self.sent_home.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class SweepReport:
    """All gates of a sweep."""

    rows: tuple[SweepRow, ...]

    @property
    def best(self) -> SweepRow:
        """The one with the fewest bits per byte over all domains."""
        return min(self.rows, key=lambda row: row.mean_bits_per_byte)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"best": self.best.name, "rows": [asdict(row) for row in self.rows]}

    def as_markdown(self) -> str:
        """The table, best first."""
        domains = list(self.rows[0].bits_per_byte)
        header = ["gate", *domains, "mean", "sent home, mean", "best layer", "entropy"]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        for row in sorted(self.rows, key=lambda row: row.mean_bits_per_byte):
            best = row.best_layer
            lines.append(
                [
                    row.name,
                    *(f"{row.bits_per_byte[domain]:.4f}" for domain in domains),
                    f"{row.mean_bits_per_byte:.4f}",
                    f"{fmean(row.sent_home.values()):.1%}" if best else "-",
                    f"{best[1]:.1%} ({best[0]})" if best else "-",
                    f"{fmean(row.entropy.values()):.2f}",
                ]
            )
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
