"""Fine-tune one model in one manner: one row of `finetune.py`.

A loop of its own instead of Trainer's, so that every step has its loss and its time; optimizer, schedule and clipping
are those of `examples/finetuning.py`.
"""

# N steps, B windows, S positions, E experts, O output, I input

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - so that the baseline includes it
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed

from benchmarks.harness.counters import forget_peak, peak_rss
from transformers_moe_offload import OffloadConfig, routing, training
from transformers_moe_offload.bench.page_cache import warm

TOP = 2
"""Experts of each layer that "chosen" trains: those that most of its tokens choose."""

TRACED = 8
"""Windows that tell which those are."""

LEARNING_RATES = {"router": 3e-3, "lora": 3e-3, "chosen": 1e-3}
"""Those of the examples."""


def train_row(
    folder: str, text: str, method: str, offload: dict[str, Any] | None = None, implementation: str | None = None
) -> dict[str, Any]:
    """Train on the windows of a file, one batch after the other; plain without `offload`, which are its options.

    The file has `trained` (N, B, S) and `held_out` (B, S); without windows in the latter nothing is evaluated.
    """
    windows = load_file(text)
    trained, held_out = windows["trained"], windows["held_out"]
    chosen = most_used(folder, trained.flatten(0, 1)[:TRACED]) if method == "chosen" else {}
    warm(sorted(Path(folder).glob("*.safetensors")))
    forget_peak()
    imports_rss = peak_rss()
    options = {} if implementation is None else {"experts_implementation": implementation}
    if offload is not None:
        options["moe_offload"] = OffloadConfig(**offload)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    load_rss = peak_rss()
    forget_peak()
    set_seed(0)
    model, num_trained = PREPARE[method](model, chosen)
    before = held_out_loss(model, held_out)
    losses, step_s = train(model, trained, LEARNING_RATES[method])
    rss = peak_rss()
    return {
        "trainable_parameters": num_trained,
        "imports_rss": imports_rss,
        "load_rss": load_rss,
        "train_rss": rss,
        "step_s": step_s,
        "losses": losses,
        "held_out": [before, held_out_loss(model, held_out)],
        "cache": cache_figures(model) if offload is not None else None,
    }


def most_used(folder: str, windows: Tensor) -> dict[str, list[int]]:
    """The experts that most tokens of some windows (B, S) choose, by layer; recorded on an offloaded model."""
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(cache_budget="50%"))
    with torch.no_grad(), routing.record_routing(model, scores=None) as recorder:
        model(input_ids=windows, use_cache=False)
    return {
        name: sorted(sorted(range(len(uses)), key=lambda expert, uses=uses: (-uses[expert], expert))[:TOP])
        for name, uses in recorder.trace.token_counts().items()
    }


def _router(model: Any, chosen: dict[str, list[int]]) -> tuple[Any, int]:
    training.set_trainable(model, "router")
    return model, _trainable(model)


def _lora(model: Any, chosen: dict[str, list[int]]) -> tuple[Any, int]:
    adapted = get_peft_model(model, training.lora_config(model, r=4, lora_alpha=8))
    return adapted, _trainable(adapted)


def _chosen(model: Any, chosen: dict[str, list[int]]) -> tuple[Any, int]:
    training.set_trainable(model, "router")
    if hasattr(model, "moe_offload"):
        training.unfreeze_experts(model, chosen)
        return model, _trainable(model)
    num_trained = _trainable(model)
    for layer, experts in chosen.items():
        for matrices in model.get_submodule(layer).parameters():  # (E, O, I)
            matrices.requires_grad_(True).register_hook(_only(experts))
            num_trained += len(experts) * matrices[0].numel()
    return model, num_trained


PREPARE: dict[str, Callable[[Any, dict[str, list[int]]], tuple[Any, int]]] = {
    "router": _router,
    "lora": _lora,
    "chosen": _chosen,
}
"""By method, what makes a model ready and counts the parameters that are trained."""


def _only(experts: list[int]) -> Callable[[Tensor], Tensor]:
    """The plain model's way to train some of the experts that are stacked in one parameter: no gradient for the others.

    AdamW leaves those as they are, as nothing decays here; it keeps state for them all the same.
    """

    def masked(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[experts] = gradient[experts]
        return kept

    return masked


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train(model: Any, batches: Tensor, learning_rate: float) -> tuple[list[float], list[float]]:
    """batches (N, B, S) -> the loss before each step, and the seconds that it took."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, len(batches) // 10), len(batches))
    model.train()
    losses, step_s = [], []
    for batch in batches:
        started = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step_s.append(time.perf_counter() - started)
    return losses, step_s


@torch.no_grad()
def held_out_loss(model: Any, windows: Tensor) -> float | None:
    """windows (B, S) -> the mean loss in nats per token; None without windows."""
    if not len(windows):
        return None
    model.eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss for part in windows.split(8)]
    weights = torch.tensor([len(part) for part in windows.split(8)])
    return float((torch.stack(losses).double() * weights).sum() / weights.sum())


def cache_figures(model: Any) -> dict[str, Any]:
    """How large the cache is, and how often it had what was asked for, evaluation included."""
    from transformers_moe_offload import cache_stats

    stats = cache_stats(model)
    names = ("hits", "late_hits", "misses", "disk_bytes", "stall_ms")
    return {name: getattr(stats, name) for name in names}
