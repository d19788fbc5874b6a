"""`moe-offload quantize`: write a checkpoint with quantized experts, without ever building the model."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_offload_cli import options


def quantize(
    source: options.Source,
    folder: options.Destination,
    experts: options.Experts = None,
    layers: options.Layers = None,
    hot: options.Hot = None,
    trace: options.HotTrace = None,
    hot_share: options.HotShare = None,
    dense: options.Dense = None,
    lm_head: options.LmHead = None,
    no_optimize: Annotated[
        bool, typer.Option("--no-optimize", help="Round to nearest: several times faster, a little worse.")
    ] = False,
    workers: options.Workers = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write and download nothing.")] = False,
    push: Annotated[str | None, typer.Option(help="Upload to this repository when done.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[str | None, typer.Option(help="The Hub's id of a model that is read from a folder.")] = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
) -> None:
    """Quantize the experts of a model with HQQ, one by one, into a checkpoint that loads like any other.

    Can be interrupted or killed at any time: run again, it goes on with what is missing.
    """
