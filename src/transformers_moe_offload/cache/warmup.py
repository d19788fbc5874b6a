"""Choose the experts to load before the first visit. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers_moe_offload.cache.capacity import layer_floor
from transformers_moe_offload.expert import ExpertId


def most_used(counts: Mapping[int, Sequence[float]], num_slots: int) -> list[ExpertId]:
    """The experts with the highest counts, `counts[layer][expert]`, for so many slots; the highest first.

    Each layer gets its floor first, as it would once all layers have asked; the slots that are left go to the highest
    counts of all. Experts that were never used get no slot.
    """
    ranked = sorted(
        (ExpertId(layer, expert) for layer, uses in counts.items() for expert, count in enumerate(uses) if count > 0),
        key=lambda expert: (-counts[expert.layer][expert.expert], expert),
    )
    floor = layer_floor(num_slots, len(counts)) if counts else 0
    chosen = [expert for layer in counts for expert in [e for e in ranked if e.layer == layer][:floor]]
    left = [expert for expert in ranked if expert not in set(chosen)]
    return sorted(chosen + left[: max(0, num_slots - len(chosen))], key=ranked.index)
