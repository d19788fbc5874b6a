"""What a sparse layer costs beyond its arithmetic when every expert it wants is resident.

The inputs are those of a real decode step, caught at the layers. Each part is then repeated by itself over all layers,
one after another, so that it finds in the processor's caches what it finds there in a forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.bench.layers import experts_of, sparse_layers
from transformers_moe_offload.compute.forward import combine, computed
from transformers_moe_offload.compute.token_grouping import Grouping, group_by_expert
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.slots.base import Weights


@dataclass
class _Step:
    """One layer, its inputs, and the results that parts of its forward take from each other."""

    module: nn.Module
    layer: SparseLayer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grouping: Grouping | None = None
    held: dict[int, Weights] | None = None
    outputs: list[Tensor] | None = None


def dispatch(model: Any, prompt: Tensor, passes: int) -> dict[str, Any]:
    """Microseconds per sparse layer at batch 1, in median, and the share of experts that were resident.

    prompt (1, S) int64: its last token is the step. Parts are None where layers compute with their model's own eager
    forward, which cannot be taken apart.
    """
    steps = _caught(model, prompt)
    runtime = model.moe_offload
    with torch.inference_mode():
        for step in steps:
            _whole(step)
        runtime.reset_stats()
        for step in steps:
            _whole(step)
        _prepare(steps, is_resident=runtime.stats().hit_rate == 1)
        runtime.reset_stats()
        timed = _time(steps, {"whole": _whole} | _parts(steps), passes)
    overhead = {name: timed.get(name) for name in ("whole", "grouping", "visit", "arithmetic", "combine")}
    whole, arithmetic = timed["whole"], timed.get("arithmetic")
    if arithmetic is not None:
        overhead["overhead"] = whole - arithmetic
        overhead["rest"] = whole - sum(timed[name] for name in ("grouping", "visit", "arithmetic", "combine"))
    return {
        "us_per_layer": overhead,
        "layers": len(steps),
        "passes": passes,
        "resident_share": runtime.stats().hit_rate,
    }


def _caught(model: Any, prompt: Tensor) -> list[_Step]:
    """The inputs of each layer in a decode step after a prompt."""
    caught: dict[str, _Step] = {}
    hooks = []
    for module, layer in sparse_layers(model):

        def catch(module: nn.Module, args: Any, kwargs: Any, layer: SparseLayer = layer) -> None:
            caught[layer.name] = _Step(module, layer, args, kwargs)

        hooks.append(module.register_forward_pre_hook(catch, with_kwargs=True))
    try:
        with torch.inference_mode():
            outputs = model(prompt[:, :-1], use_cache=True)
            model(prompt[:, -1:], use_cache=True, **kv_cache_argument(model, outputs))
    finally:
        for hook in hooks:
            hook.remove()
    return list(caught.values())


def _whole(step: _Step) -> object:
    return step.module(*step.args, **step.kwargs)


def _prepare(steps: list[_Step], *, is_resident: bool) -> None:
    """Take each forward apart once.

    If all experts are resident, weights are used in their slots, so that memory is as fast for the arithmetic alone as
    it is for the whole; otherwise they are copied, as a view of a slot is invalid once the expert is evicted.
    """
    for step in steps:
        if step.layer.mlp is None:
            continue
        _, top_k_index, top_k_weights = _inputs(step)
        cache = experts_of(step.module).cache
        step.grouping = group_by_expert(top_k_index, top_k_weights, cache.num_experts(step.layer.index))
        step.held = {}
        with cache.turn, cache.visit(step.layer.index, step.grouping.by_last_use) as visit:
            for expert, weights in visit:
                step.held[expert] = weights if is_resident else {name: one.clone() for name, one in weights.items()}
        outputs = _arithmetic(step)
        step.outputs = [outputs[expert] for expert in step.grouping.experts]


def _parts(steps: list[_Step]) -> dict[str, Callable[[_Step], object]]:
    """Each part as a function of one layer; empty where a layer cannot be taken apart."""
    if any(step.layer.mlp is None for step in steps):
        return {}

    def grouping(step: _Step) -> None:
        _, top_k_index, top_k_weights = _inputs(step)
        group_by_expert(top_k_index, top_k_weights, experts_of(step.module).cache.num_experts(step.layer.index))

    def visit(step: _Step) -> None:
        assert step.grouping is not None
        cache = experts_of(step.module).cache
        with cache.turn, cache.visit(step.layer.index, step.grouping.by_last_use) as opened:
            for _ in opened.batches():
                pass

    def combination(step: _Step) -> None:
        assert step.grouping is not None
        assert step.outputs is not None
        hidden_states, _, top_k_weights = _inputs(step)
        combine(step.outputs, step.grouping, hidden_states, top_k_weights)

    return {"grouping": grouping, "visit": visit, "arithmetic": _arithmetic, "combine": combination}


def _arithmetic(step: _Step) -> dict[int, Tensor]:
    """The products of all experts that the step wants, together as in its forward."""
    assert step.layer.mlp is not None
    assert step.grouping is not None
    assert step.held is not None
    codecs = experts_of(step.module).codecs
    return computed(step.layer.mlp, step.module, _inputs(step)[0], step.grouping, step.held, codecs)


def _inputs(step: _Step) -> tuple[Tensor, Tensor, Tensor]:
    hidden_states, top_k_index, top_k_weights = (*step.args, *step.kwargs.values())[:3]
    return hidden_states, top_k_index, top_k_weights


def _time(steps: list[_Step], parts: dict[str, Callable[[_Step], object]], passes: int) -> dict[str, float]:
    """Microseconds per layer of each part, the median over passes in which the parts take turns.

    The small parts are timed after a layer's arithmetic, which is not counted: in the whole forward, too, the weights
    that stream through have pushed everything else out of the processor's caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    device = steps[0].layer.device
    for _ in range(passes + 1):
        for name, work in parts.items():
            stream = parts["arithmetic"] if name not in ("whole", "arithmetic") else None
            taken = 0.0
            for step in steps:
                if stream is not None:
                    stream(step)
                _wait_for(device)
                started = time.perf_counter()
                work(step)
                _wait_for(device)
                taken += time.perf_counter() - started
            seconds[name].append(taken)
    return {name: median(taken[1:]) / len(steps) * 1e6 for name, taken in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
