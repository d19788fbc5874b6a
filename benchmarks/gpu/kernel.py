"""Measure how long the device takes for the experts of a layer, in a slot and read in place, with made-up experts."""

# K experts per token, H hidden

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.device_decode.forward import OnDevice
from transformers_moe_offload.formats.base import Codec
from transformers_moe_offload.hybrid.profiling import fastest, made_records
from transformers_moe_offload.store.record import RecordLayout

LAYERS = 16
"""Layers that are submitted one after another before the host waits, as in a forward. Without a GPU each is computed in
Triton's interpreter, which takes a thousand times as long: there it is one layer, with two experts."""


def kernel_seconds(
    mlp: ExpertMlp, experts: nn.Module, token: Tensor, layout: RecordLayout, codec: Codec | None
) -> dict[str, float]:
    """Seconds for each expert that a `token` (1, H) wants: in a slot, read in place, and to submit a whole layer."""
    records = made_records(layout.nbytes)[: None if token.is_cuda else 2]
    in_slots = [record.to(token.device) for record in records]
    in_place = [record.pin_memory() for record in records] if token.is_cuda else records
    compute = OnDevice(mlp, layout, codec, len(records), experts)
    num_layers = LAYERS if token.is_cuda else 1

    def layers(places: Sequence[Tensor]) -> Callable[[], None]:
        addresses = torch.tensor([place.data_ptr() for place in places], device=token.device)
        index = torch.arange(len(places), device=token.device).unsqueeze(0)
        weights = torch.full(index.shape, 1 / len(places), dtype=token.dtype, device=token.device)

        def submit() -> None:
            for _ in range(num_layers):
                compute(experts, token, index, weights, addresses)

        return submit

    def seconds(submit: Callable[[], None]) -> float:
        def work() -> None:
            submit()
            _wait_for(token.device)

        return fastest(work) / num_layers

    with torch.no_grad():
        resident, in_ram = layers(in_slots), layers(in_place)
        found = {"resident_s": seconds(resident) / len(records), "read_s": seconds(in_ram) / len(records)}
        started = time.perf_counter()
        resident()
        found["submit_s"] = (time.perf_counter() - started) / num_layers
        _wait_for(token.device)
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
