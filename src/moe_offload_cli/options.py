"""Arguments and options that several subcommands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Where a model comes from, and how it is loaded.
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder with a checkpoint, or the id of a model on the Hub.", show_default=False
    ),
]
CacheBudget = Annotated[
    str, typer.Option(help="Memory for experts: '6GiB', '500MB', '40%' of all experts, a number of bytes, or 'auto'.")
]
Policy = Annotated[str, typer.Option(help="Which expert leaves when another one needs its slot.")]
CacheAware = Annotated[
    float | None,
    typer.Option(
        help="Strength by which routers prefer resident experts: faster, and results change. See `tradeoff`.",
        show_default=False,
    ),
]
Arithmetic = Annotated[str, typer.Option(help="'fast', 'exact': bit for bit what Transformers computes, or 'int8'.")]
Mmap = Annotated[
    bool | None, typer.Option(help="Use experts in the page cache, or copy them. Default: by the RAM that is free.")
]
DeviceMap = Annotated[str | None, typer.Option(help="As in from_pretrained: 'auto', 'cpu', 'cuda:1', ...")]
Dtype = Annotated[str, typer.Option(help="'auto' (as stored), or a torch dtype such as 'bfloat16'.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Access token of the Hub; default is the one you are logged in with.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the Hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]

# Formats of experts, by layer and by use.
Experts = Annotated[str | None, typer.Option(help="Format of experts, bits x group size: '4x64', '3x64', '2x16'.")]
Layers = Annotated[
    list[str] | None,
    typer.Option(help="Another format for some sparse layers, as '0-3=4x64', or '5=none'; can be repeated."),
]
Hot = Annotated[
    str | None,
    typer.Option(help="Format of the experts that most tokens of --trace chose, or 'none'.", show_default=False),
]
HotTrace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        help="What `moe-offload trace` has written, or the folder of a recording of the routing, for --hot.",
        show_default=False,
    ),
]
HotShare = Annotated[str | None, typer.Option(help="Share of all experts that are hot; 10% unless given.")]
Dense = Annotated[str | None, typer.Option(help="Format of attention and dense MLPs; default is as stored.")]
LmHead = Annotated[str | None, typer.Option(help="Format of the output embedding; default is as stored.")]

# What is generated.
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0 always takes the likeliest token. Default: what the model asks for."),
]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that make up this share.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")]  # numpy's has 32 bits

# Where a checkpoint is written.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A folder with a checkpoint, or the id of a model on the Hub.", show_default=False
    ),
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.", show_default=False)]
Workers = Annotated[int | None, typer.Option(min=1, help="Experts at a time; default is one per core.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a complete checkpoint, once the new one is complete.")
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with what an interrupted build has left, or do not.")
]

# What a trace is played with.
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="Play this one; may be given several times. Default: all.", show_default=False),
]
