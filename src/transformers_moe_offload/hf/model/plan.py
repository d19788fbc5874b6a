"""What a plan of the caches says, and its table. `planning.py` makes it, and `pools.py` builds what it describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transformers_moe_offload.cache.capacity import PoolNeed
from transformers_moe_offload.notebook import html_paragraph, html_table
from transformers_moe_offload.stats import said_of


@dataclass(frozen=True)
class PoolPlan:
    """One pool of slots: the layers that share it and its size."""

    device: torch.device
    layers: tuple[int, ...]
    need: PoolNeed
    num_slots: int
    is_mapped: bool = False
    """Whether slots are mapped pages of the files instead of buffers."""
    arena_bytes: int = 0
    """Page-locked RAM for all experts of the pool, which the device can read; 0 if it does not decode on the device."""
    is_in_ram: bool = False
    """Whether the experts are in our own memory instead of files: it is page-locked in place, and the host tier holds
    no copies."""
    spare_bytes: int | None = None
    """Bytes of every slot beyond the expert's own, if whole pages of files are read past the page cache into slots;
    else None."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pool's slots, at most."""
        return self.need.bytes_of(self.num_slots)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different sizes of experts in bytes, ascending."""
        return tuple(sorted({self.need.slot_bytes, *(size for size, _ in self.need.others)}))


@dataclass(frozen=True, repr=False)
class OffloadPlan:
    """Where a model's experts are stored, and how many fit into the cache. Notebooks show it as a table."""

    pools: tuple[PoolPlan, ...]
    budget_bytes: int
    smallest_budget: int
    host_bytes: int = 0
    """RAM for experts on their way to accelerators."""
    reads_past_cache: bool = False
    """Whether files are read past the page cache (direct I/O)."""
    arena_refused: str | None = None
    """Why there is no arena although experts could be read by address; None if there is one or none was planned."""
    follows_cache: str | None = None
    """The strategy that chooses experts by what is resident, so that results depend on it; None where they do not."""

    @property
    def num_experts(self) -> int:
        """Experts of all sparse layers."""
        return sum(pool.need.num_experts for pool in self.pools)

    @property
    def num_slots(self) -> int:
        """Experts that can be resident at once."""
        return sum(pool.num_slots for pool in self.pools)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' records."""
        return sum(pool.need.all_bytes for pool in self.pools)

    @property
    def arena_bytes(self) -> int:
        """Page-locked RAM for experts that the devices read by address."""
        return sum(pool.arena_bytes for pool in self.pools)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.cache_bytes for pool in self.pools)

    def __repr__(self) -> str:
        layers = sum(pool.need.num_layers for pool in self.pools)
        return (
            f"OffloadPlan({self.num_slots} slots for the {self.num_experts} experts of {layers} sparse layers, "
            f"{readable(self.cache_bytes)} of {readable(self.expert_bytes)})"
        )

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        said = html_paragraph(said_of(self.follows_cache)) if self.follows_cache else ""
        return html_table(header, rows) + html_paragraph(self._budgets()) + said

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*lines, self._budgets(), *([said_of(self.follows_cache)] if self.follows_cache else [])])

    def _table(self) -> list[list[str]]:
        """The header, then a row for each pool."""
        header = ["tier", "sparse layers", "experts", "bytes per expert", "all experts", "slots", "cache"]
        rows = [
            [
                f"{pool.device} (mapped)" if pool.is_mapped else str(pool.device),
                str(pool.need.num_layers),
                str(pool.need.num_experts),
                " to ".join(map(readable, pool.sizes)),
                readable(pool.need.all_bytes),
                f"{pool.num_slots} ({pool.num_slots / pool.need.num_experts:.0%})",
                readable(pool.cache_bytes),
            ]
            for pool in self.pools
        ]
        if self.arena_bytes:
            header.append("page-locked")
            for row, pool in zip(rows, self.pools, strict=True):
                row.append(readable(pool.arena_bytes) if pool.arena_bytes else "-")
        return [header, *rows]

    def _budgets(self) -> str:
        return (
            f"cache budget {readable(self.budget_bytes)}, smallest that works {readable(self.smallest_budget)} "
            f"({self.smallest_budget:,} bytes); {self._beyond_the_cache()}"
        )

    def _beyond_the_cache(self) -> str:
        on_disk = "stay on disk, read past the page cache" if self.reads_past_cache else "stay on disk"
        if all(pool.arena_bytes for pool in self.pools):
            return "experts beyond the cache are read in page-locked RAM"
        num_in_ram = sum(pool.need.num_experts for pool in self.pools if pool.is_in_ram)
        if num_in_ram == self.num_experts:
            return "experts beyond the cache are in RAM"
        if num_in_ram:
            tier = f", {readable(self.host_bytes)} of it hold others" if self.host_bytes else ""
            return f"beyond the cache {num_in_ram} experts are in RAM{tier}, the others {on_disk}"
        if not self.host_bytes:
            return f"experts beyond the cache {on_disk}"
        return f"beyond the cache {readable(self.host_bytes)} of RAM hold experts, the others {on_disk}"


def readable(nbytes: float) -> str:
    """A number of bytes with a unit: `6.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
