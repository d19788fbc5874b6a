"""Train chosen experts of an offloaded model in full, between frozen others.

A recording of the routing tells which experts a domain uses; ESFT (arXiv 2407.01906) found that training those few is
as good for a task as training everything, and forgets less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.hf.model.handle import OffloadRuntime, runtime_of
from transformers_moe_offload.hf.model.unfreezing import make_own
from transformers_moe_offload.tracing import CountsTokens


def unfreeze_experts(
    model: Any,
    experts: Mapping[str | int, Iterable[int]] | None = None,
    *,
    top: int | None = None,
    trace: CountsTokens | Mapping[str, Iterable[float]] | None = None,
) -> list[str]:
    """Make experts parameters of the model that are trained, too; returns the names of these parameters
    in the model (in the base model of one that PEFT has wrapped).

    Give either `experts`, by the sparse layer's module path or its place among the sparse layers; or `top`, a number of
    experts in every layer, those that most tokens chose by `trace`: a `RoutingTrace`, a `Trace` with steps of one
    token, or counts.
    Create the optimizer afterwards. The experts stay in memory and take their part of `cache_budget`; an optimizer's
    state comes on top. A budget that is too small raises `CapacityError`.
    """
    runtime = runtime_of(model)
    if (experts is None) == (top is None) or (top is None) != (trace is None):
        raise ConfigError("say which experts: either experts={layer: [...]}, or top=n together with trace=...")
    chosen = _most_used(runtime, top, trace) if top is not None else _by_name(runtime, experts or {})
    prefix = next(
        (name for name, module in model.named_modules() if getattr(module, "moe_offload", None) is runtime), ""
    )
    names = [f"{prefix}.{name}" if prefix else name for name in make_own(runtime, chosen)]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def _by_name(runtime: OffloadRuntime, experts: Mapping[str | int, Iterable[int]]) -> dict[str, list[int]]:
    names = [layer.name for layer in runtime.layers]
    chosen = {}
    for key, indices in experts.items():
        if isinstance(key, int) and 0 <= key < len(names):
            key = names[key]
        if key not in names:
            raise ConfigError(f"the model has no sparse layer {key!r}; it has {len(names)}, the first is {names[0]!r}")
        chosen[str(key)] = sorted(set(indices))
    return chosen


def _most_used(runtime: OffloadRuntime, top: int, trace: Any) -> dict[str, list[int]]:
    counts = trace.token_counts() if isinstance(trace, CountsTokens) else trace
    chosen = {}
    for layer in runtime.layers:
        uses = list(counts.get(layer.name, ()))
        if len(uses) != layer.num_experts:
            raise ConfigError(f"{len(uses)} counts for the experts of {layer.name}, which has {layer.num_experts}")
        if not 0 < top <= layer.num_experts:
            raise ConfigError(f"top={top} of {layer.num_experts} experts; choose 1 to {layer.num_experts}")
        ranked = sorted(range(len(uses)), key=lambda expert: (-uses[expert], expert))
        chosen[layer.name] = sorted(ranked[:top])
    return chosen
