"""`moe-offload`: the application with all its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_offload_cli.bake import bake
from moe_offload_cli.bench import bench
from moe_offload_cli.build import build
from moe_offload_cli.chat import chat
from moe_offload_cli.convert import convert
from moe_offload_cli.plan import plan
from moe_offload_cli.push import push
from moe_offload_cli.quantize import quantize
from moe_offload_cli.replay import replay
from moe_offload_cli.report import report
from moe_offload_cli.subcommand import Subcommand, carried_out
from moe_offload_cli.trace import trace
from moe_offload_cli.tradeoff import tradeoff
from moe_offload_cli.tune import tune

SUBCOMMANDS = (plan, chat, quantize, convert, build, bake, push, bench, trace, replay, report, tradeoff, tune)
"""In the order of the help."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Run mixture-of-experts models with their experts on disk and a cache of them in memory.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata  # takes as long as Typer

        typer.echo(metadata.version("transformers-moe-offload"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that belong to no subcommand."""


for declared in SUBCOMMANDS:
    app.command(cls=Subcommand)(carried_out(declared))
