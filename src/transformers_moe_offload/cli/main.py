"""`moe-offload`: where the subcommands meet."""

from __future__ import annotations

from typing import Annotated

import typer

import transformers_moe_offload
from transformers_moe_offload.cli.bake import bake
from transformers_moe_offload.cli.bench import bench
from transformers_moe_offload.cli.build import build
from transformers_moe_offload.cli.chat import chat
from transformers_moe_offload.cli.convert import convert
from transformers_moe_offload.cli.plan import plan
from transformers_moe_offload.cli.push import push
from transformers_moe_offload.cli.quantize import quantize
from transformers_moe_offload.cli.replay import replay
from transformers_moe_offload.cli.report import report
from transformers_moe_offload.cli.trace import trace

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Run mixture-of-experts models with their experts on disk and a cache of them in memory.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(transformers_moe_offload.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that belong to no subcommand."""


app.command()(plan)
app.command()(chat)
app.command()(quantize)
app.command()(convert)
app.command()(build)
app.command()(bake)
app.command()(push)
app.command()(bench)
app.command()(trace)
app.command()(replay)
app.command()(report)
