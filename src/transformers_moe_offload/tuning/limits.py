"""What is refused before anything is measured, and how a model is loaded so that RAM is short for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import psutil

from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import can_drop, drop
from transformers_moe_offload.config import Budget, OffloadConfig
from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.model.handle import runtime_of
from transformers_moe_offload.hf.model.plan import OffloadPlan
from transformers_moe_offload.store.direct_io_probe import is_faster_past_cache
from transformers_moe_offload.tracing import Trace, TraceError

Load = Callable[[OffloadConfig], Any]
"""Loads a model with a config."""


def checked_ram(ram: int | str) -> int:
    """Bytes of RAM for experts; raises `ConfigError` for what is no size, and for more than the machine has."""
    nbytes = Budget.parse(ram, "ram").nbytes
    if nbytes is None:
        raise ConfigError(f"ram={ram!r} is not a size; write bytes as an int, or a size such as '8GiB'")
    there_is = psutil.virtual_memory().total
    if nbytes > there_is:
        raise ConfigError(
            f"ram={ram!r} is {nbytes:,} bytes, and this machine has {there_is:,}: settings could not be run; give what "
            f"experts may take here"
        )
    return nbytes


def expect_same_layers(trace: Trace, layers: Sequence[tuple[str, int]], model: str) -> None:
    """Raise `TraceError` unless the trace was recorded with these layers: the path and the number of experts of each.

    `model` is its name, for the error.
    """
    names, num_experts = tuple(name for name, _ in layers), tuple(number for _, number in layers)
    if trace.num_experts != num_experts:
        raise TraceError(
            f"the trace was recorded with {_described(trace.num_experts)}, and {model} has {_described(num_experts)}; "
            f"record one with this model"
        )
    if trace.layer_names != names:
        raise TraceError(
            f"the trace was recorded with another model, whose first sparse layer is {trace.layer_names[0]}; that of "
            f"{model} is {names[0]}; record one with this model"
        )


def _described(num_experts: Sequence[int]) -> str:
    counts = "/".join(str(count) for count in sorted(set(num_experts)))
    return f"{len(num_experts)} sparse layers of {counts} experts"


def loaded_within(load: Load, config: OffloadConfig, notes: list[str]) -> tuple[Any, OffloadConfig]:
    """The model with its experts in the RAM of the config and not in the page cache, and its config.

    Experts are read past the page cache where that is faster, else through it, and then it is emptied before each step.
    """
    past = replace(config, direct_io=True)
    model = load(past)
    expect_on_cpu(runtime_of(model).plan)
    if is_past_cache_faster(model):
        return model, past
    model.moe_offload.close()
    if not can_drop():
        notes.append("RAM is not short here: this system cannot be asked to forget files that it has cached")
    through = replace(config, direct_io=False)
    return load(through), through


def is_past_cache_faster(model: Any) -> bool:
    """Whether a model's experts are read faster past the page cache, once they are not in it."""
    store = store_of(model)
    if any(source.is_in_ram for source in store.layers.values()):
        return False
    if can_drop():
        drop(files_of(store))
    return is_faster_past_cache(store)


def expect_on_cpu(plan: OffloadPlan) -> None:
    """Raise `UnsupportedModelError` if experts are computed anywhere else."""
    devices = sorted({str(pool.device) for pool in plan.pools})
    if devices != ["cpu"]:
        raise UnsupportedModelError(
            f"experts are computed on {', '.join(devices)}, and what is timed are experts in the RAM of a CPU; load "
            f"the model with device_map='cpu'"
        )


def num_weights(model: Any) -> int:
    """Weights of all experts."""
    specs = [source.spec for source in store_of(model).layers.values()]
    return sum(spec.num_experts * prod(field.shape) for spec in specs for field in spec.fields)
