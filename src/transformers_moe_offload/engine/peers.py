"""Copies of experts in the memory that other GPUs have to spare, where they come into a slot faster than from the host.

Kernels read absent experts in the arena all the same: what comes from another GPU leaves that link to them. Which
experts have a copy where is decided in `cache/lodging.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transformers_moe_offload.cache.lodging import lodgings
from transformers_moe_offload.engine.arena import Arena
from transformers_moe_offload.engine.streams import CudaStreams, Streams
from transformers_moe_offload.expert import ExpertId

logger = logging.getLogger(__name__)

PASSES = 3
"""The fastest counts: nothing makes a machine faster than it is."""


def lodge(
    arenas: Mapping[torch.device, Sequence[Arena]],
    spare_bytes: Mapping[torch.device, int],
    faster: Mapping[torch.device, Sequence[torch.device]],
) -> None:
    """Have copies of the experts in some devices' arenas on other devices, as far as there is memory to spare."""
    record_bytes: dict[torch.device, dict[ExpertId, int]] = {
        device: {expert: arena.record(expert).nbytes for arena in of_device for expert in arena.experts}
        for device, of_device in arenas.items()
    }
    for device, places in lodgings(record_bytes, spare_bytes, faster).items():
        for arena in arenas[device]:
            members = {expert: places[expert] for expert in arena.experts if expert in places}
            arena.copy_to(members)
            if members:
                logger.info(
                    f"{len(members)} of the {len(arena.experts)} experts of {device} have a copy on another GPU"
                )


def faster_peers(device: torch.device, others: Sequence[torch.device], record: Tensor) -> list[torch.device]:
    """The other GPUs from which an expert comes faster than from the host, the fastest first; measured.

    record (nbytes,) uint8 is one in page-locked memory.
    """
    streams, target = CudaStreams(device), torch.empty_like(record, device=device)
    from_host_s = copy_seconds(streams, target, record)
    seconds = {
        other: copy_seconds(streams, target, record.to(other))
        for other in others
        if torch.cuda.can_device_access_peer(device, other)  # else it would go through the host
    }
    return sorted((other for other, peer_s in seconds.items() if peer_s < from_host_s), key=seconds.__getitem__)


def copy_seconds(streams: Streams, target: Tensor, source: Tensor) -> float:
    """Seconds of a copy by these streams, both (nbytes,) uint8, after one that is not counted."""

    def once() -> float:
        copy = streams.copy(target, source, (streams.mark(),))  # what had the memory before may be read still
        copy.wait()
        assert copy.seconds is not None
        return copy.seconds

    once()
    return min(once() for _ in range(PASSES))
