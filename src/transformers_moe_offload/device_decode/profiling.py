"""Measure how long a sparse layer of a decode step takes from the host and on the device, with made-up experts.

`hybrid/profiling.py` measures how long it takes to move experts or to compute them on the host.
"""

# K experts per token, H hidden

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.forward import sparse_forward
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.device_decode.cost_model import DecodeRates
from transformers_moe_offload.device_decode.forward import OnDevice
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.formats.base import Coding
from transformers_moe_offload.formats.by_expert import LayerCodings
from transformers_moe_offload.hybrid.profiling import fastest, made_records
from transformers_moe_offload.hybrid.split import MissRates
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.slots.base import Weights
from transformers_moe_offload.slots.transfer import Transfer
from transformers_moe_offload.store.record import RecordLayout

LAYERS = 16
"""Layers that are submitted one after another before the host waits, as in a forward. Without a GPU each is computed in
Triton's interpreter, which takes a thousand times as long: there it is one layer, with two experts."""


def decode_rates(
    mlp: ExpertMlp,
    experts: nn.Module,
    token: Tensor,
    num_wanted: int,
    layout: RecordLayout,
    coding: Coding | None,
    misses: MissRates,
) -> DecodeRates:
    """The rates of a layer whose tokens want so many experts, for a `token` (1, H) in its dtype, on its device."""
    records = made_records(layout.nbytes)[: None if token.is_cuda else 2]
    in_slots = [record.to(token.device) for record in records]
    in_place = [record.pin_memory() for record in records] if token.is_cuda else records
    compute = OnDevice(mlp, layout, coding, len(records), experts)

    def seconds(places: Sequence[Tensor]) -> float:
        addresses = torch.tensor([place.data_ptr() for place in places], device=token.device)
        routing = _routing(len(places), token)
        return _seconds(lambda: compute(experts, token, *routing, addresses), token.device) / len(places)

    resident_s, read_s = seconds(in_slots), seconds(in_place)
    few = [in_slots[number % len(in_slots)] for number in range(num_wanted)]
    addresses = torch.tensor([place.data_ptr() for place in few], device=token.device)
    of_few, routing = OnDevice(mlp, layout, coding, num_wanted, experts), _routing(num_wanted, token)
    cache = ExpertCache(_MadeSlots(few, layout), num_wanted, {0: num_wanted}, LRU())
    codings = LayerCodings(coding)
    from_host_s = _seconds(
        lambda: sparse_forward(cache, 0, mlp, experts, token, *routing, codings=codings), token.device
    )
    return DecodeRates(
        misses,
        resident_s=resident_s,
        read_s=read_s,
        host_s=max(0.0, from_host_s - num_wanted * resident_s),
        submit_s=_submit_seconds(lambda: of_few(experts, token, *routing, addresses), token.device),
    )


def _routing(num_wanted: int, token: Tensor) -> tuple[Tensor, Tensor]:
    """A token that wants the first so many experts: top_k_index (1, K) int64, top_k_weights (1, K)."""
    index = torch.arange(num_wanted, device=token.device).unsqueeze(0)
    return index, torch.full(index.shape, 1 / num_wanted, dtype=token.dtype, device=token.device)


@torch.no_grad()
def _seconds(layer: Callable[[], object], device: torch.device) -> float:
    """Seconds of one layer, as the mean of some that follow each other."""

    num_layers = _num_layers(device)

    def layers() -> None:
        for _ in range(num_layers):
            layer()
        _wait_for(device)

    return fastest(layers) / num_layers


@torch.no_grad()
def _submit_seconds(layer: Callable[[], object], device: torch.device) -> float:
    """Seconds for which one of them keeps the host busy."""
    num_layers = _num_layers(device)
    layer()
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(num_layers):
        layer()
    elapsed_s = time.perf_counter() - started
    _wait_for(device)
    return elapsed_s / num_layers


def _num_layers(device: torch.device) -> int:
    return LAYERS if device.type == "cuda" else 1


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: device -> host


class _MadeSlots:
    """Slots that hold made-up experts from the beginning."""

    num_lanes = 1

    def __init__(self, records: Sequence[Tensor], layout: RecordLayout) -> None:
        self._views = [layout.views(record) for record in records]

    def add(self, slot: int) -> None:
        """Nothing to do: the slot exists."""

    def remove(self, slot: int) -> None:
        """Nothing to do: the slot stays."""

    def start(self, expert: ExpertId, slot: int, alongside: int = 0) -> Transfer:
        """Nothing to load: all made-up experts are alike."""
        return _There()

    def retire(self, slots: Sequence[int]) -> None:
        """Nothing is ever copied."""

    def give_back(self) -> None:
        """Nothing to do: evicted experts take no memory."""

    def start_over(self, held: Mapping[int, ExpertId]) -> None:
        """Nothing to do: no load is ever in flight."""

    def weights(self, expert: ExpertId, slot: int) -> Weights:
        """The weights of the made-up expert in the slot."""
        return self._views[slot]

    def lost(self, slots: Sequence[int]) -> Sequence[int]:
        """None: nothing takes them away."""
        return ()

    def device_bytes(self, expert: ExpertId) -> int:
        """Always 0: nothing is copied."""
        return 0


class _There:
    """A transfer that was over when it began."""

    seconds = 0.0

    def is_done(self) -> bool:
        return True

    def finish(self) -> int:
        return 0

    def cancel(self) -> bool:
        return False
