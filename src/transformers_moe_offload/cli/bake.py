"""`moe-offload bake`: a mixture of adapters becomes one of feed-forward blocks, which stock Transformers loads."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from transformers_moe_offload.builder import bake_adapters
from transformers_moe_offload.builder.writing.folder import MARKS
from transformers_moe_offload.cli.building import outcome
from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.writing import resumable
from transformers_moe_offload.output.place import expect_place


def bake(source: Path, folder: Path, container: str, dtype: str | None, resume: bool, overwrite: bool) -> None:
    """Write the mixture of feed-forward blocks, and say what was checked."""
    if not source.is_dir():
        raise CommandError(f"there is no folder {source}; name one that `moe-offload build` or training has written")
    expect_place(folder, MARKS, overwrite=overwrite, model=source)
    with resumable(folder, MARKS, resume=resume):
        info = bake_adapters(source, folder, container=container, dtype=dtype, resume=resume, overwrite=overwrite)
    experts = f"{len(info.experts)} experts, {info.experts_per_token} a token"
    console = Console()
    console.print(f"{info.container}: {experts} ({', '.join(info.experts)})", soft_wrap=True, markup=False)
    console.print(outcome(info), soft_wrap=True, markup=False)
