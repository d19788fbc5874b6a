"""`moe-offload build`: make a mixture of experts from dense models or adapters, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from rich.console import Console

from transformers_moe_offload.builder import MoeRecipe, build_adapter_moe, build_moe, validate_recipe
from transformers_moe_offload.builder.adapters.plan import plan_adapters
from transformers_moe_offload.builder.writing.folder import MARKS
from transformers_moe_offload.cli import options
from transformers_moe_offload.cli.building import adapters_shown, mixture_shown, outcome, said_once
from transformers_moe_offload.cli.writing import progress, resumable


def build(
    recipe: Path,
    folder: Path,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    push: str | None,
    device: str,
    **hub: Unpack[options.Hub],
) -> None:
    """Show the plan, then build, check and upload as asked."""
    options.expect_device("--device", device)
    asked, console = MoeRecipe.from_file(recipe), Console()
    is_of_adapters = asked.kind == "adapter_moe"
    if is_of_adapters:
        adapters = plan_adapters(asked, **hub)
        shown, nbytes = adapters_shown(adapters), adapters.nbytes
    else:
        plan = validate_recipe(asked, **hub)
        shown, nbytes = mixture_shown(plan), plan.nbytes
    shown.print(console)
    if dry_run:
        return
    with (
        said_once(shown.warnings),
        resumable(folder, MARKS, resume=resume),
        progress("building", nbytes) as advance,
    ):
        info = (build_adapter_moe if is_of_adapters else build_moe)(
            asked,
            folder,
            device=device,
            resume=resume,
            overwrite=overwrite,
            push=push,
            advance=advance,
            **hub,
        )
    console.print(outcome(info), soft_wrap=True, markup=False)
    if push is not None:
        console.print(f"pushed to {push}", soft_wrap=True, markup=False)
