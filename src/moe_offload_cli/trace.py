"""`moe-offload trace`: record which experts real generations ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def trace(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace, an .npz file.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Generate from this; may be given several times.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file; generate from each of its lines.", show_default=False)
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Record there what routers scored and chose, too: a new folder, for `report`.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a recording that is in the --routing folder already.")
    ] = False,
    cache_budget: options.CacheBudget = "auto",
    policy: Annotated[str, typer.Option(help="Decides how long the recording takes, never what it holds.")] = "lru",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens for each prompt.")] = 128,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Generate from prompts and record which experts each layer wants, for `replay` and `report`.

    Ctrl-C ends the recording after the token being generated, and what there is by then is written. The trace holds
    no text.
    """
