"""`moe-offload build`: make a mixture of experts from dense models, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transformers_moe_offload.build import MoeBuildInfo, MoeRecipe, build_moe, validate_recipe
from transformers_moe_offload.build.plan import BuildPlan
from transformers_moe_offload.cli import options, writing
from transformers_moe_offload.cli.build_adapters import build_adapters
from transformers_moe_offload.cli.failures import one_line_errors
from transformers_moe_offload.cli.writing import progress
from transformers_moe_offload.hf.plan import readable
from transformers_moe_offload.memory.record import dtype_name


def build(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file, ours or mergekit-moe's.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on with what an interrupted build has left, or do not."),
    ] = True,
    overwrite: writing.Overwrite = False,
    push: Annotated[str | None, typer.Option(help="Upload to this repository when done, as the recipe says.")] = None,
    device: Annotated[str, typer.Option(help="Where the base model's layers run while gates are computed.")] = "cpu",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
) -> None:
    """Build a mixture of experts from dense models or adapters, check it, and put it in OUT.

    Can be interrupted or killed at any time: run again, it goes on with what is missing.
    """
    with one_line_errors():
        asked = MoeRecipe.from_file(recipe)
        console = Console()
        if asked.kind == "adapter_moe":
            build_adapters(
                asked, folder, console, dry_run=dry_run, device=device, resume=resume, overwrite=overwrite, push=push,
                token=token, local_files_only=local_files_only,
            )  # fmt: skip
            return
        plan = validate_recipe(asked, token=token, local_files_only=local_files_only)
        console.print(_title(plan), style="bold", soft_wrap=True)
        console.print(_table(plan))
        for warning in plan.warnings:
            console.print(f"warning: {warning}", soft_wrap=True, markup=False)
        if dry_run:
            return
        with progress("building", plan.nbytes) as advance:
            info = build_moe(
                asked,
                folder,
                device=device,
                resume=resume,
                overwrite=overwrite,
                push=push,
                token=token,
                local_files_only=local_files_only,
                advance=advance,
            )
        console.print(_outcome(info), soft_wrap=True, markup=False)
        if push is not None:
            console.print(f"pushed to {push}", soft_wrap=True, markup=False)


def _title(plan: BuildPlan) -> str:
    shape = plan.shape
    return (
        f"{plan.container.name}: {shape.num_experts} experts, {shape.experts_per_token} a token, in "
        f"{len(shape.layers)} of {shape.num_layers} layers; {dtype_name(plan.dtype)}, {readable(plan.nbytes)}"
    )


def _table(plan: BuildPlan) -> Table:
    table = Table("part", "from", box=box.SIMPLE_HEAD)
    table.add_column("parameters", justify="right", no_wrap=True)
    parameters, shape = plan.parameters, plan.shape
    table.add_row("stem", " + ".join(source.name for source in plan.stems), f"{parameters.stem:,}")
    per_expert = parameters.experts // shape.num_experts
    for name in plan.mixture.names:
        table.add_row("expert", name, f"{per_expert:,}")
    if parameters.shared:
        table.add_row("shared", f"{shape.shared_width} channels", f"{parameters.shared:,}")
    table.add_row("routers", f"gate: {plan.recipe.gate.mode}", f"{parameters.routers:,}")
    table.add_row("all", "", f"{parameters.total:,}")
    table.add_row("active", "for one token", f"{parameters.active:,}")
    return table


def _outcome(info: MoeBuildInfo) -> str:
    checks = info.checks
    loaded = "loads with every byte" if checks.was_loaded else "loads by names and shapes (too large to load whole)"
    return (
        f"wrote {info.folder}; checked: {loaded}, identity {checks.identity:.1e}, forced experts "
        f"{checks.forced_expert:.1e}"
    )
