"""Measure what sets the limits of a machine with a GPU: link, memories, and the kernels on a model's experts."""

from __future__ import annotations

import subprocess
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.kernel import kernel_seconds
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.bandwidth import RAM_BYTES, best_s, link_bandwidth, ram_bandwidth
from transformers_moe_offload.bench.layers import sparse_layers, store_of
from transformers_moe_offload.hf.decode.engines import record_layout
from transformers_moe_offload.hf.model.host_sides import token_of

DEVICE_COPIES = 16
"""Copies in a row: a GPU finishes one before the host has submitted the next."""


def measure_bandwidths(folder: str, repeats: int) -> dict[str, Any]:
    """Bytes per second by what they pass through; None for what this machine has not."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, moe_offload=OffloadConfig(cache_budget="25%", decode="host", misses="fetch")
    )
    module, layer = sparse_layers(model)[0]
    record_bytes = store_of(model).layout(layer.index, 0).nbytes
    found: dict[str, Any] = {
        "record_bytes": record_bytes,
        "ram": ram_bandwidth(repeats),
        "link": None,
        "gpu_bytes_per_s": None,
        "driver": None,
    }
    if layer.device.type == "cuda":
        found["link"] = link_bandwidth(layer.device, record_bytes, repeats)
        found["gpu_bytes_per_s"] = device_bandwidth(layer.device, repeats)
        found["driver"] = driver()
    source, token = model.moe_offload.source(layer), token_of(model, layer, model.moe_offload.spec(layer), layer.device)
    assert layer.mlp is not None
    found["kernel"] = kernel_seconds(layer.mlp, module, token, record_layout(source), source.codecs.usual)
    return found


def device_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second that a GPU reads and writes in its own memory, by a copy: each byte counts for both."""
    source = torch.ones(RAM_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(DEVICE_COPIES):
            target.copy_(source)
        torch.cuda.synchronize(device)

    return 2 * DEVICE_COPIES * RAM_BYTES / best_s(copy, repeats)


def driver() -> str:
    """The driver's version, as its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
