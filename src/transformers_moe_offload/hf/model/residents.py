"""Which experts of a layer need not be loaded, as a tensor for routers: asked for before the layer is visited."""

# E experts

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.cache.cache import ExpertCache


def residents_of(cache: ExpertCache, layer: int, device: torch.device) -> Tensor | None:
    """(E,) bool: the experts of a layer that are resident or loading; None if that is all of them.

    As of now, without the cache's turn: other threads may change what is resident before the layer is visited.
    """
    flags = cache.with_slots(layer)
    if 0 not in flags:
        return None
    found = torch.frombuffer(bytearray(flags), dtype=torch.bool)
    return found if device.type == "cpu" else found.to(device)  # copy: host -> device
