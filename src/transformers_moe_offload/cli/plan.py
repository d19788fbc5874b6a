"""`moe-offload plan`: where offloading would put a model's weights, before they are downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from transformers_moe_offload.cli import formats, options
from transformers_moe_offload.config import Budget, OffloadConfig
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.hf.loading.meta_model import MetaModel, meta_model
from transformers_moe_offload.hf.model.placements import Placement
from transformers_moe_offload.hf.model.plan import OffloadPlan, readable
from transformers_moe_offload.hf.model.planning import make_plan
from transformers_moe_offload.hf.prebuilt.sizes import Sizes
from transformers_moe_offload.hf.prebuilt.source import Quantization
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.system.free_memory import HOST_SHARE, available_bytes

TOLERANCE = 0.01
"""Sizes that differ by less than this agree: checkpoints carry small extras, such as buffers that are not loaded."""


def plan(
    model: str,
    cache_budget: str,
    experts: str | None,
    layers: list[str] | None,
    hot: str | None,
    trace: Path | None,
    hot_share: str | None,
    dense: str | None,
    lm_head: str | None,
    dtype: str,
    **origin: Unpack[options.Origin],
) -> None:
    """Print where weights would be, how many experts fit into the cache, and what a token would read."""
    asked = formats.parse_formats(experts, layers, hot, trace, hot_share, dense, lm_head)
    config = OffloadConfig(cache_budget=cache_budget, experts=asked.experts, dense=asked.dense, lm_head=asked.lm_head)
    source = meta_model(model, options.parse_dtype(dtype), **origin)
    asked.expect_traced(source)
    weights = _Weights.of(source, config if source.recipe is None else source.recipe.override(config))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    offload_plan = make_plan(weights.placements(device), _settled(config, weights, device))
    console = Console()
    console.print(source.title, style="bold", soft_wrap=True)
    console.print(_tiers(weights, offload_plan, device))
    console.print(_facts(weights, offload_plan))


@dataclass(frozen=True)
class _Weights:
    """A model's weights, as they are or quantized."""

    source: MetaModel
    codecs: tuple[LayerCodecs, ...]
    formats: str
    """How experts are stored, as printed."""
    dense_bytes: int
    bits_per_weight: float | None
    """Of experts, on average; None where they are not quantized."""
    is_in_ram: bool
    """Whether experts are quantized while the model is loaded."""

    @classmethod
    def of(cls, source: MetaModel, config: OffloadConfig) -> _Weights:
        """A model's weights, quantized as a config says."""
        quantization = Quantization.of(source.model, config, source.dtype, source.opener)
        tensors = source.quantized_tensors()
        stored = None if tensors is None else quantization.stored_bytes(tensors)
        sizes = Sizes.of(quantization, stored)
        is_in_ram = config.formats is not None and source.recipe is None
        codecs, bits = tuple(quantization.codecs), None if config.formats is None else sizes.bits_per_expert_weight
        dense_bytes = sizes.dense_bytes if quantization.packed else source.dense_bytes
        if stored is not None and config.formats is None:
            codecs, bits = stored.codecs, 8 * stored.expert_bytes / sizes.expert_weights
        if stored is not None and config.dense is None and source.keeps_dense:
            dense_bytes = stored.dense_bytes - quantization.bytes_saved
        return cls(source, codecs, str(config.formats) if is_in_ram else "as stored", dense_bytes, bits, is_in_ram)

    def placements(self, device: torch.device) -> list[Placement]:
        """Every sparse layer on a device."""
        pairs = zip(self.source.experts, self.codecs, strict=True)
        is_mapped = self.is_in_ram and device.type == "cpu"
        return [
            Placement(spec, device, codecs, is_mappable=is_mapped, is_in_ram=self.is_in_ram) for spec, codecs in pairs
        ]

    @property
    def read_share(self) -> float:
        """Bytes in the files for each byte in memory."""
        return 1.0 if self.source.recipe is not None else self.source.read_share


def _settled(config: OffloadConfig, weights: _Weights, device: torch.device) -> OffloadConfig:
    """The config with the budget `auto` replaced by the bytes that the dense weights will leave."""
    if config.budget != Budget():
        return config
    share = HOST_SHARE if device.type == "cpu" else 1.0
    left = int(available_bytes(device) - share * weights.dense_bytes)
    every_slot = make_plan(weights.placements(device), OffloadConfig(cache_budget="100%", mmap=False, direct_io=False))
    return OffloadConfig(cache_budget=max(1, min(left, every_slot.expert_bytes)))


def _tiers(weights: _Weights, plan: OffloadPlan, device: torch.device) -> Table:
    table = Table("tier", "holds", box=box.SIMPLE_HEAD)
    table.add_column("bytes", justify="right", no_wrap=True)
    for pool in plan.pools:
        held = f"{pool.num_slots} of {pool.need.num_experts} experts ({pool.num_slots / pool.need.num_experts:.0%})"
        table.add_row(f"cache ({pool.device})", held, readable(pool.cache_bytes))
    table.add_row(f"dense ({device})", "everything but routed experts", readable(weights.dense_bytes))
    store, share = ("RAM", 1.0) if weights.is_in_ram else ("disk", weights.read_share)
    table.add_row(store, f"all {plan.num_experts} experts, {weights.formats}", readable(plan.expert_bytes * share))
    return table


def _facts(weights: _Weights, plan: OffloadPlan) -> Table:
    source = weights.source
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("sparse layers", str(len(source.experts)))
    table.add_row("experts", f"{plan.num_experts}, {_range([spec.num_experts for spec in source.experts])} per layer")
    table.add_row("experts per token", _experts_per_token(source))
    placements = weights.placements(torch.device("cpu"))
    table.add_row("bytes per expert", _range([one for layer in placements for one in layer.record_bytes], readable))
    if weights.bits_per_weight is not None:
        table.add_row("bits per expert weight", f"{weights.bits_per_weight:.2f}")
    table.add_row("all experts", readable(plan.expert_bytes))
    table.add_row("dense weights", readable(weights.dense_bytes))
    table.add_row("slots", f"{plan.num_slots} in a cache budget of {readable(plan.budget_bytes)}")
    table.add_row("smallest budget", f"{readable(plan.smallest_budget)} ({plan.smallest_budget:,} bytes)")
    table.add_row("expected bytes per token", _expected_bytes(weights, plan))
    table.add_row("checkpoint", _cross_check(source))
    return table


def _range(values: list[int], write: Callable[[int], str] = str) -> str:
    """One value, or the smallest and the largest of several."""
    ends = sorted({min(values), max(values)})
    return " to ".join(write(value) for value in ends)


def _experts_per_token(source: MetaModel) -> str:
    counts = [experts_per_token(source.model, spec.name) for spec in source.experts]
    known = [count for count in counts if count is not None]
    return f"{_range(known)} per layer" if len(known) == len(counts) else "unknown: the model does not say"


def _expected_bytes(weights: _Weights, plan: OffloadPlan) -> str:
    """What one decoded token reads with uniform routing and a full cache, over all sparse layers."""
    num_experts, nbytes = 0, 0.0
    by_layer = {spec.layer: spec for spec in weights.source.experts}
    for pool in plan.pools:
        absent = 1 - pool.num_slots / pool.need.num_experts
        for layer in pool.layers:
            count = experts_per_token(weights.source.model, by_layer[layer].name)
            if count is None:
                return "unknown, because the experts per token are"
            num_experts += count
            nbytes += count * pool.need.all_bytes / pool.need.num_experts * absent * weights.read_share
    return (
        f"{readable(nbytes)} from {'RAM' if weights.is_in_ram else 'disk'}, if routing is uniform: {num_experts} "
        f"experts a token, {1 - plan.num_slots / plan.num_experts:.0%} of them not in the cache"
    )


def _cross_check(source: MetaModel) -> str:
    if source.recipe is not None:
        recipe = source.recipe
        head = f"; output embedding {recipe.lm_head}" if recipe.lm_head is not None else ""
        return f"quantized: experts {recipe.formats}; dense layers {recipe.dense or 'as they are'}{head}"
    if source.opener is not None:
        is_opened = source.opener.is_for_dense and not source.keeps_dense
        dense = "dense layers are opened while they are loaded" if is_opened else "dense layers are used as they are"
        return f"quantized with {source.opener.name}; {dense}"
    stored, expected = source.stored.nbytes, source.total_bytes * source.read_share
    dtype = dtype_name(source.stored.dtype or source.dtype)
    if stored is None:
        return f"{readable(expected)} by its config in {dtype}; there is no index to check that with"
    if abs(stored - expected) <= TOLERANCE * stored:
        return f"{readable(stored)} by its index, which agrees with its config"
    return (
        f"{readable(stored)} by its index, but {readable(expected)} by its config in {dtype}: it holds weights that "
        f"the model does not use, or lacks some, or stores them in another dtype"
    )
