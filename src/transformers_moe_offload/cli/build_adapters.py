"""What `moe-offload build` does with a recipe for a mixture of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from transformers_moe_offload.build.adapters.build import build_adapter_moe
from transformers_moe_offload.build.adapters.plan import AdapterPlan, plan_adapters
from transformers_moe_offload.build.recipe import MoeRecipe
from transformers_moe_offload.cli.writing import progress
from transformers_moe_offload.hf.plan import readable


def build_adapters(recipe: MoeRecipe, folder: Path, console: Console, *, dry_run: bool, **options: Any) -> None:
    """Show the plan, and build it unless it was only to be shown; `options` are those of `build_adapter_moe`."""
    plan = plan_adapters(recipe, token=options["token"], local_files_only=options["local_files_only"])
    console.print(_title(plan), style="bold", soft_wrap=True)
    console.print(_table(plan))
    for warning in plan.licence.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    if dry_run:
        return
    with progress("building", plan.nbytes) as advance:
        info = build_adapter_moe(recipe, folder, advance=advance, **options)
    checked = (
        "loads by names and shapes (too large to load whole)"
        if info.forced_expert is None
        else f"loads with every byte, adapters alone {info.forced_expert:.1e}"
    )
    console.print(f"wrote {info.folder}; checked: {checked}", soft_wrap=True, markup=False)
    if options["push"] is not None:
        console.print(f"pushed to {options['push']}", soft_wrap=True, markup=False)


def _title(plan: AdapterPlan) -> str:
    config = plan.config
    return (
        f"{config.model_type}: {config.num_experts} adapters on {plan.base.name}, {config.num_experts_per_tok} a "
        f"token; {readable(plan.nbytes)}"
    )


def _table(plan: AdapterPlan) -> Table:
    table = Table("part", "from", box=box.SIMPLE_HEAD)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_row("dense model", plan.base.name, readable(sum(spec.nbytes for spec in plan.dense.values())))
    for adapter in plan.adapters:
        table.add_row("adapter", adapter.name, readable(adapter.folder.weights.stat().st_size))
    routing = plan.recipe.adapter_moe
    assert routing is not None
    routers = sum(spec.nbytes for spec in plan.routers.values())
    table.add_row("routers", f"{routing.scoring}, per {routing.router_per}", readable(routers))
    return table
