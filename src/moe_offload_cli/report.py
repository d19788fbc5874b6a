"""`moe-offload report`: draw a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def report(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE",
            help="What `moe-offload trace` has written, or the folder of a recording of the routing.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the plots, made if it is not there; or a file that ends in .html: one page with all.",
            show_default=False,
        ),
    ],
    policy: options.Policies = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the cache: numbers of slots, or shares of all experts. Default: ten sizes from 5% to 100%.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw hit rates by residency, the use of experts by layer, and stalls over time. Needs the extra `plots`.

    Of a recording of the routing, also how sure routers are, which experts go together, and what each domain prefers.
    """
