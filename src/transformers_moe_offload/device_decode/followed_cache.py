"""A cache whose experts a device also uses without asking: where they are, in slots or over the link."""

from __future__ import annotations

from collections.abc import Container, Sequence

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.cache.change import change
from transformers_moe_offload.cache.planner import Load, plan_behind
from transformers_moe_offload.expert import ExpertId


class FollowedCache(ExpertCache):
    """It is told afterwards which experts the device has used; `background_fill.py` loads those that were absent."""

    @change
    def used_in_place(self, layer: int, wanted: Sequence[int], hits: Container[int]) -> None:
        """A device has used experts of a layer wherever they were: `hits` in slots, the others over the link."""
        stats, experts = self.stats[layer], [ExpertId(layer, expert) for expert in wanted]
        for expert in experts:
            if expert.expert in hits:
                stats.hits += 1
                if expert in self._ahead:
                    self._ahead.remove(expert)
                    stats.prefetch_used += 1
            else:
                stats.misses += 1
                stats.in_place += 1
                stats.device_bytes += self.slots.device_bytes(expert)
        self._policy.begin(layer, experts)
        if self.on_visit is not None:
            self.on_visit(layer, wanted)
        self.announce(expert for expert in experts if self.residency.is_resident(expert))

    def plan_behind(self, absent: Sequence[ExpertId], spared: Container[ExpertId]) -> list[Load]:
        """Slots for absent experts that a device has used in place; `spared` experts are not evicted for them."""
        return plan_behind(absent, self.residency, self._policy.candidates(), spared, self._floor)
