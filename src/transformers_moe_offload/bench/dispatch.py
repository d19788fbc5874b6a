"""What a sparse layer costs beyond its arithmetic when every expert it wants is resident.

The inputs are those of a real decode step, caught at the layers. Each part is then repeated by itself over all layers,
one after another, so that it finds in the processor's caches what it finds there in a forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_moe_offload.bench.layers import experts_of, sparse_layers
from transformers_moe_offload.compute.forward import combine, outputs_of
from transformers_moe_offload.compute.one_call import OneCall
from transformers_moe_offload.compute.token_grouping import Grouping, group_by_expert
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.upstream import kv_cache_argument


class _Step(NamedTuple):
    """One layer and its inputs."""

    module: nn.Module
    layer: SparseLayer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Parts = dict[str, Callable[[], object]]
"""What is timed of one layer, by name."""


def dispatch(model: Any, prompt: Tensor, passes: int) -> dict[str, Any]:
    """Microseconds per sparse layer at batch 1, in median, and the share of experts that were resident.

    prompt (1, S) int64: its last token is the step. Parts are None where layers compute with their model's own eager
    forward, which cannot be taken apart.
    """
    steps = _caught(model, prompt)
    wholes: list[Callable[[], object]] = [partial(step.module, *step.args, **step.kwargs) for step in steps]
    runtime = model.moe_offload
    with torch.inference_mode():
        for whole in wholes:
            whole()
        runtime.reset_stats()
        for whole in wholes:
            whole()
        is_resident = runtime.stats().hit_rate == 1
        layers: list[Parts] = [{"whole": whole} for whole in wholes]
        if all(step.layer.mlp is not None for step in steps):
            for layer, step in zip(layers, steps, strict=True):
                layer.update(_parts(step, is_resident=is_resident))
        runtime.reset_stats()
        timed = _time(layers, steps[0].layer.device, passes)
    overhead = {name: timed.get(name) for name in ("whole", "grouping", "visit", "arithmetic", "combine")}
    whole_us, arithmetic = timed["whole"], timed.get("arithmetic")
    if arithmetic is not None:
        overhead["overhead"] = whole_us - arithmetic
        overhead["rest"] = whole_us - sum(
            timed.get(name, 0.0) for name in ("grouping", "visit", "arithmetic", "combine")
        )
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


def _parts(step: _Step, *, is_resident: bool) -> Parts:
    """Take the forward of one layer apart: each part as a function.

    If all experts are resident, weights are used in their slots, so that memory is as fast for the arithmetic alone as
    it is for the whole; otherwise they are copied, as a view of a slot is invalid once the expert is evicted. Where one
    call of the kernels computes the layer, that call is the arithmetic, and there are no other parts.
    """
    hidden_states, top_k_index, top_k_weights = (*step.args, *step.kwargs.values())[:3]
    layer, experts = step.layer.index, experts_of(step.module)
    cache, mlp = experts.cache, step.layer.mlp
    assert mlp is not None
    one_call = cache.tables.by_layer.get(layer)
    if is_resident and isinstance(one_call, OneCall):
        kernel, out = one_call.kernel, torch.empty_like(hidden_states)
        return {"arithmetic": lambda: kernel.step(hidden_states, top_k_index, top_k_weights, out, time.monotonic())}

    def group() -> Grouping:
        return group_by_expert(top_k_index, top_k_weights, cache.num_experts(layer))

    grouping, held = group(), {}
    with cache.turn, cache.visit(layer, grouping.by_last_use) as visit:
        for expert, weights in visit:
            held[expert] = weights if is_resident else {name: one.clone() for name, one in weights.items()}

    def visited() -> None:
        with cache.turn, cache.visit(layer, grouping.by_last_use) as opened:
            for _ in opened.batches():
                pass

    def arithmetic() -> dict[int, Tensor]:
        return outputs_of(mlp, step.module, hidden_states, grouping, held, experts.codecs)

    outputs = arithmetic()
    in_order = [outputs[expert] for expert in grouping.experts]
    return {
        "grouping": group,
        "visit": visited,
        "arithmetic": arithmetic,
        "combine": lambda: combine(in_order, grouping, hidden_states, top_k_weights),
    }


def _time(layers: list[Parts], device: torch.device, passes: int) -> dict[str, float]:
    """Microseconds per layer of each part, the median over passes in which the parts take turns.

    The small parts are timed after a layer's arithmetic, which is not counted: in the whole forward, too, the weights
    that stream through have pushed everything else out of the processor's caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in layers[0] if all(name in parts for parts in layers)}
    for _ in range(passes + 1):
        for name, of_pass in seconds.items():
            taken = 0.0
            for parts in layers:
                if name not in ("whole", "arithmetic"):
                    parts["arithmetic"]()
                _wait_for(device)
                started = time.perf_counter()
                parts[name]()
                _wait_for(device)
                taken += time.perf_counter() - started
            of_pass.append(taken)
    return {name: median(taken[1:]) / len(layers) * 1e6 for name, taken in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
