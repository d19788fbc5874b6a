"""How much memory an automatic budget takes on each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from transformers_moe_offload.cache.capacity import PoolNeed
from transformers_moe_offload.slots.buffers import allocated_bytes
from transformers_moe_offload.system.free_memory import available_bytes


def room_for_slots(
    devices: Sequence[torch.device], needs: Sequence[PoolNeed], held: Mapping[torch.device, int]
) -> dict[torch.device, int]:
    """Bytes of slots that fit on each device; `devices[i]` is the device of the pool with `needs[i]`.

    `held` are bytes of existing caches that will be resized. Bytes lost to alignment between slots are not counted.
    """
    shares: dict[torch.device, float] = {}
    for device, need in zip(devices, needs, strict=True):
        sizes = (need.slot_bytes, *(size for size, _ in need.others))
        shares[device] = min([shares.get(device, 1.0), *(n / allocated_bytes(n, device) for n in sizes)])
    return {device: int(share * available_bytes(device, held.get(device, 0))) for device, share in shares.items()}
