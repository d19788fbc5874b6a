"""Train the small model with some weight of locality, and measure its cache and its loss: one row of `locality.py`."""

# B windows, S positions, V tokens of the vocabulary

from __future__ import annotations

import tempfile
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, set_seed

from benchmarks.quality.held_out import losses
from benchmarks.training.finetune_row import train
from transformers_moe_offload import OffloadConfig, cache_stats, routing, training
from transformers_moe_offload.hf.upstream import kv_cache_parameter

LEARNING_RATE = 3e-3
"""That of `examples/finetune_router.py`."""


def locality_row(
    folder: str,
    text: str,
    steps: int,
    batch: int,
    stepwise: int,
    locality: float = 0.0,
    window: int = 1,
    is_trained: bool = True,
) -> dict[str, Any]:
    """Train the routers on the windows of a file, or leave them as they are.

    The file has `trained` and `held_out`, (B, S) each; of the latter's domains, one window each is read token by token,
    the first `stepwise` tokens of it.
    """
    windows = load_file(text)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if is_trained:
        training.set_trainable(model, "router")
        regulariser = training.RouterRegulariser(model, locality=locality, locality_window=window)
        order = torch.randperm(len(windows["trained"]))[: steps * batch]
        train(model, windows["trained"][order].view(steps, batch, -1), LEARNING_RATE)
        regulariser.remove()
    model.eval()
    held_out = windows["held_out"]
    with routing.record_routing(model, scores=None) as recorder, torch.no_grad():
        found = losses(model, held_out)
    trace = recorder.trace
    statistics = [trace.statistics(router) for router in range(len(trace.routers))]
    with tempfile.TemporaryDirectory() as trained:
        model.to(torch.bfloat16).save_pretrained(trained)
        cache = read_token_by_token(trained, held_out[:: max(1, len(held_out) // 3)][:3, :stepwise])
    return cache | {
        "losses": found.tolist(),
        "repeat_rate": sum(one.repeat_rate for one in statistics) / len(statistics),
        "load_cv": sum(one.figures()["load_cv"] for one in statistics) / len(statistics),
    }


@torch.no_grad()
def read_token_by_token(folder: str, windows: Tensor) -> dict[str, float]:
    """windows (B, S) -> hits of a cache for a quarter of the experts, bytes, and the loss, one text after the other."""
    config = OffloadConfig(cache_budget="25%", policy="lru", prefetch=None, mmap=False)
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
    name = kv_cache_parameter(type(model).forward)
    nats = []
    for window in windows:
        past = DynamicCache(config=model.config)
        for token, following in pairwise(window):
            logits = model(token.view(1, 1), use_cache=True, **{name: past}).logits[0, -1]
            nats.append(functional.cross_entropy(logits.double(), following).item())
    stats = cache_stats(model)
    return {
        "hit_rate": stats.hit_rate,
        "mib_per_token": stats.disk_bytes / len(nats) / 2**20,
        "stepwise_loss": sum(nats) / len(nats),
    }
