"""`moe-offload replay`: hit rates of other policies and sizes on a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE",
            help="What `moe-offload trace` has written, or the folder of a recording of the routing.",
            show_default=False,
        ),
    ],
    policy: options.Policies = None,
    slots: Annotated[
        str, typer.Option(help="Sizes of the cache: numbers of slots, or shares of all experts.")
    ] = "10%,25%,50%",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all counts there, too.", show_default=False)
    ] = None,
) -> None:
    """Play a trace with each policy and size through the cache a model runs with, and print the hit rates.

    The last line is Belady's oracle, which knows the future: no cache that loads on demand alone can do better.
    """
