"""Count what the cache did, per sparse layer.

Counts are per expert and visit: a forward in which four tokens want one expert counts it once, and one that runs a
layer three times counts what each of the three visits wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from transformers_moe_offload.notebook import html_paragraph, html_table


@dataclass
class LayerStats:
    """What one sparse layer asked of the cache."""

    hits: int = 0
    """Experts that were resident when the layer asked."""
    late_hits: int = 0
    """Experts whose load was already in flight when the layer asked."""
    misses: int = 0
    """Experts whose load started because the layer asked."""
    computed: int = 0
    """Of the misses, experts that the host computed in its memory, without a load."""
    in_place: int = 0
    """Of the misses, experts that an accelerator read where they were, in host memory, without waiting for a load."""
    prefetch_used: int = 0
    """Experts loaded ahead of demand and then asked for."""
    prefetch_wasted: int = 0
    """Experts loaded ahead of demand and evicted unused."""
    disk_bytes: int = 0
    """Bytes read from checkpoint files."""
    device_bytes: int = 0
    """Bytes that an accelerator got from host memory, copied to it or read in place."""
    stall_ms: float = 0.0
    """Time the layer waited for loads, in milliseconds."""

    @property
    def asked(self) -> int:
        """Experts asked for."""
        return self.hits + self.late_hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident; 0 before the first one."""
        return self.hits / self.asked if self.asked else 0.0


@dataclass(repr=False)
class CacheStats(LayerStats):
    """Totals over all sparse layers, and each layer's own counts by its module path. Notebooks show them as a table."""

    per_layer: Mapping[str, LayerStats] = field(default_factory=dict)
    follows_cache: str | None = None
    """The strategy that chooses experts by what is resident, so that results depend on it; None where they do not."""

    @classmethod
    def total(cls, per_layer: Mapping[str, LayerStats]) -> CacheStats:
        """Sum up the layers' counts."""
        sums = {f.name: sum(getattr(layer, f.name) for layer in per_layer.values()) for f in fields(LayerStats)}
        return cls(**sums, per_layer=per_layer)

    def __repr__(self) -> str:
        return f"CacheStats({self})"

    def _repr_html_(self) -> str:
        head = ["sparse layer", "asked for", "hits", "hit rate", "late hits", "misses", "MiB read", "ms waited"]
        rows = [
            [
                path, f"{layer.asked:,}", f"{layer.hits:,}", f"{layer.hit_rate:.1%}", f"{layer.late_hits:,}",
                f"{layer.misses:,}", f"{layer.disk_bytes / 2**20:,.1f}", f"{layer.stall_ms:,.0f}",
            ]
            for path, layer in [("all", self), *self.per_layer.items()]
        ]  # fmt: skip
        return html_table(head, rows) + (html_paragraph(said_of(self.follows_cache)) if self.follows_cache else "")

    def __str__(self) -> str:
        counts = (
            f"{self.asked} experts asked for: {self.hits} hits ({self.hit_rate:.1%}), {self.late_hits} late hits, "
            f"{self.misses} misses; {self.disk_bytes / 2**20:.1f} MiB read, {self.stall_ms:.0f} ms waited"
        )
        return f"{counts}; {said_of(self.follows_cache)}" if self.follows_cache else counts


def said_of(strategy: str) -> str:
    """What statistics and plans say of a strategy that chooses experts by what is resident."""
    return f"results depend on what is resident, because routers follow {strategy}"
