"""Measure how fast absent experts can be moved, and how fast the host could compute them instead.

On made-up experts, before any real one is loaded: only their size matters. All of it takes some tenths of a second.
"""

# N rows, H hidden

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hybrid.cpu_experts import HostCompute
from transformers_moe_offload.hybrid.split import MissRates
from transformers_moe_offload.slots.transfer import Copier
from transformers_moe_offload.store.record import ReadInto

COLD_BYTES = 128 << 20
"""Bytes of the experts that are computed one after another, so that each one's weights come from memory: more than the
caches of nearly all processors."""

MOST_EXPERTS = 64
"""Most experts made for measuring; if more were needed for `COLD_BYTES`, they are so small that they take microseconds
anyway."""

FILLING = 0x3C
"""The value of each byte of a made-up expert. As bfloat16, float16 and float32 that is a number around 0.01 or 1: zeros
would not take real memory, and numbers near zero would take processors longer than others."""

MANY_ROWS = 8
"""Rows with which the cost of each further row is measured."""

PASSES = 3
"""Passes, of which the fastest counts: disturbances only make a machine slower."""

MOVED = 8
"""Experts that are moved at once, as many as a token of most models asks for."""

MOVED_BYTES = 256 << 20
"""Most bytes of all of them, unless one alone takes more: a cache that is there already leaves little memory."""


def measured_rates(
    mlp: ExpertMlp,
    experts: nn.Module,
    token: Tensor,
    record_bytes: int,
    opened: Callable[[Tensor], ExpertWeights],
    copier: Callable[[ReadInto], Copier],
    host: HostCompute,
) -> MissRates:
    """The rates of one layer, from experts that are made for it.

    token (1, H) is on the layer's device, in its dtype. `opened` views a record, uint8 (record_bytes,), as an expert,
    and `copier` makes a copier that fills slots on the device from records that the given function reads.
    """
    records = made_records(record_bytes)

    def read(expert: ExpertId, record: Tensor) -> int:
        record.copy_(records[expert.expert % len(records)])
        return 0

    row = torch.full(token.shape, 2.0**-10, dtype=token.dtype)
    num_slots = max(1, min(MOVED, MOVED_BYTES // record_bytes))
    slots = [torch.empty(record_bytes, dtype=torch.uint8, device=token.device) for _ in range(num_slots)]
    expert_s, row_s = host_seconds(lambda rows, weights: mlp(experts, rows, weights), list(map(opened, records)), row)
    return MissRates(
        fetch_s=fetch_seconds(copier(read), slots),
        expert_s=expert_s,
        row_s=row_s,
        trip_s=fastest(lambda: host.start(mlp, experts, token, {}, _no_expert).finish()),
    )


def fetch_seconds(copier: Copier, slots: Sequence[Tensor]) -> float:
    """Seconds for which each of several experts that are moved at once keeps the link busy.

    Each slot, uint8 (record_bytes,) on a device, receives one.
    """

    def move() -> None:
        transfers = [copier.start(ExpertId(0, expert), slot) for expert, slot in enumerate(slots)]
        for transfer, slot in zip(transfers, slots, strict=True):
            transfer.finish()
            copier.retire(slot)
        if slots[0].is_cuda:
            torch.cuda.synchronize(slots[0].device)

    return fastest(move) / len(slots)


def host_seconds(
    compute: Callable[[Tensor, ExpertWeights], object], experts: Sequence[ExpertWeights], row: Tensor
) -> tuple[float, float]:
    """Seconds that the host takes for an expert and one row (1, H), and for each further row."""

    def seconds(rows: Tensor) -> float:
        def work() -> None:
            for weights in experts:
                compute(rows, weights)

        with torch.no_grad():
            return fastest(work) / len(experts)

    one, many = seconds(row), seconds(row.repeat(MANY_ROWS, 1))
    return one, max(0.0, many - one) / (MANY_ROWS - 1)


def made_records(record_bytes: int) -> list[Tensor]:
    """Made-up experts, uint8 (record_bytes,) each, in host memory."""
    number = min(max(2, COLD_BYTES // record_bytes), MOST_EXPERTS)
    return [torch.full((record_bytes,), FILLING, dtype=torch.uint8) for _ in range(number)]


def _no_expert(expert: int) -> AbstractContextManager[ExpertWeights]:
    raise AssertionError(f"expert {expert} was opened, but there is none to compute")


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    work()
    return min(timeit.repeat(work, number=1, repeat=PASSES))
