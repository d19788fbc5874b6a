"""`moe-offload tradeoff`: what cache-aware routing costs and gains, and the strength to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def tradeoff(
    model: options.Model,
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Text to measure with, which the model was not trained on; may be given several times.",
            show_default=False,
        ),
    ],
    strengths: Annotated[str, typer.Option(help="Strengths to measure, beside 0.")] = "0.05,0.1,0.15,0.2,0.3,0.4",
    protect: Annotated[int, typer.Option(min=0, help="So many of a token's best experts are always chosen.")] = 1,
    max_loss: Annotated[
        str, typer.Option(help="By how much the perplexity may rise for the strength that is recommended.")
    ] = "1%",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to predict at each strength.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read from an empty cache, in one piece.")] = 256,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Drop the checkpoint from the page cache before every token, as if it were much larger than RAM.",
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what has been measured there, and go on from it.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there, too.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw speed against loss, as .svg or .png.", show_default=False),
    ] = None,
    cache_budget: options.CacheBudget = "auto",
    policy: options.Policy = "lru",
    arithmetic: options.Arithmetic = "fast",
    mmap: options.Mmap = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Read a text token by token with routers that prefer residents more or less, and recommend a strength.

    For each strength: hits, bytes and tokens per second, and what the predictions lose, each with a 95 % interval.
    Ctrl-C ends the measurement; with --resume the same command goes on from there.
    """
