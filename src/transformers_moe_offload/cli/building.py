"""Output of the commands that build: the plan before, and the results of the checks after."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from transformers_moe_offload.builder import AdapterMoeInfo, MoeBuildInfo
from transformers_moe_offload.builder.adapters.plan import AdapterPlan
from transformers_moe_offload.builder.plan import BuildPlan
from transformers_moe_offload.builder.writing.folder import build_place
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.hf.model.plan import readable


class Shown(NamedTuple):
    """A plan as it is printed."""

    title: str
    table: Table
    warnings: Sequence[str]

    def print(self, console: Console) -> None:
        """Print it to the console."""
        console.print(self.title, style="bold", soft_wrap=True)
        console.print(self.table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", soft_wrap=True, markup=False)


@contextmanager
def said_once(warnings: Sequence[str]) -> Iterator[None]:
    """Drop from a build's log the warnings that were shown with the plan."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.getMessage() not in warnings

    logger = logging.getLogger(build_place.__module__)
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def mixture_shown(plan: BuildPlan) -> Shown:
    """The plan of a mixture of feed-forward blocks: where they come from, and how many parameters they have."""
    shape, parameters = plan.shape, plan.parameters
    title = (
        f"{plan.container.name}: {shape.num_experts} experts, {shape.experts_per_token} a token, in "
        f"{len(shape.layers)} of {shape.num_layers} layers; {dtype_name(plan.dtype)}, {readable(plan.nbytes)}"
    )
    table = _table("parameters")
    table.add_row("stem", " + ".join(source.name for source in plan.stems), f"{parameters.stem:,}")
    per_expert = parameters.experts // shape.num_experts
    for name in plan.mixture.names:
        table.add_row("expert", name, f"{per_expert:,}")
    if parameters.shared:
        table.add_row("shared", f"{shape.shared_width} channels", f"{parameters.shared:,}")
    table.add_row("routers", f"gate: {plan.recipe.gate.mode}", f"{parameters.routers:,}")
    table.add_row("all", "", f"{parameters.total:,}")
    table.add_row("active", "for one token", f"{parameters.active:,}")
    return Shown(title, table, plan.warnings)


def adapters_shown(plan: AdapterPlan) -> Shown:
    """The plan of a mixture of adapters: where they come from, and how many bytes they have."""
    config, routing = plan.config, plan.recipe.adapter_moe
    assert routing is not None
    title = (
        f"{config.model_type}: {config.num_experts} adapters on {plan.base.name}, {config.num_experts_per_tok} a "
        f"token; {readable(plan.nbytes)}"
    )
    table = _table("bytes")
    table.add_row("dense model", plan.base.name, readable(sum(spec.nbytes for spec in plan.dense.values())))
    for adapter in plan.adapters:
        table.add_row("adapter", adapter.name, readable(adapter.folder.weights.stat().st_size))
    routers = sum(spec.nbytes for spec in plan.routers.values())
    table.add_row("routers", f"{routing.scoring}, per {routing.router_per}", readable(routers))
    return Shown(title, table, plan.licence.warnings)


def outcome(info: MoeBuildInfo | AdapterMoeInfo) -> str:
    """What was written, and the results of its checks."""
    if isinstance(info, AdapterMoeInfo):
        was_loaded = info.forced_expert is not None
        compared = f", adapters alone {info.forced_expert:.1e}" if was_loaded else ""
    else:
        checks = info.checks
        was_loaded = checks.was_loaded
        compared = f", identity {checks.identity:.1e}, forced experts {checks.forced_expert:.1e}"
    loaded = "loads with every byte" if was_loaded else "loads by names and shapes (too large to load whole)"
    return f"wrote {info.folder}; checked: {loaded}{compared}"


def _table(last: str) -> Table:
    table = Table("part", "from", box=box.SIMPLE_HEAD)
    table.add_column(last, justify="right", no_wrap=True)
    return table
