"""`moe-offload tune`: the settings with which a model decodes fastest in so much RAM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def tune(
    model: options.Model,
    ram: Annotated[str, typer.Option(help="Memory for experts: '8GiB', '500MB', or a number of bytes.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text to tune for, which the model was not trained on; may be given several times.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Tune for what `moe-offload trace` has written, or for a recording of the routing, instead.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="Compare this one; may be given several times. Default: all.", show_default=False
        ),
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option("--predictor", help="Of experts to load ahead; may be given several times. Default: all."),
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Formats of experts to compare, beside that they are stored in; 'none' for no other.")
    ] = "8x32,4x32",
    strengths: Annotated[
        str, typer.Option(help="Strengths of cache-aware routing to compare, beside 0; 'none' for no other.")
    ] = "0.1,0.2",
    max_loss: Annotated[
        str, typer.Option(help="By how much the perplexity may rise for the setting that is recommended.")
    ] = "1%",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each run reads.")] = 512,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read from an empty cache, in one piece.")] = 256,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there, too.", show_default=False)
    ] = None,
    arithmetic: options.Arithmetic = "fast",
    dtype: options.Dtype = "auto",
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Predict how fast a model decodes with many settings, run the best three in so much RAM, and recommend one.

    Policies, budgets and prefetching keep results; formats and strengths change them, and are compared where a text
    tells what they cost. Prints one line of code, its predicted and its measured speed. Leave the machine alone
    meanwhile.
    """
