"""`moe-offload bench`: how fast a model is on this machine, and how much of the machine's limit that is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_offload_cli import options


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A folder with a checkpoint, or the id of a model on the Hub."),
    ] = None,
    cache_budget: options.CacheBudget = "auto",
    policy: options.Policy = "lru",
    cache_aware: options.CacheAware = None,
    arithmetic: options.Arithmetic = "fast",
    prefetch: Annotated[
        str | None, typer.Option(help="Load experts ahead of demand, by this predictor. Default: load none ahead.")
    ] = None,
    mmap: options.Mmap = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this file, too.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One short run of everything; the figures mean little.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure products with matrices in low bits instead of a model.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Measure with this text. Default: this package's own sources.")
    ] = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure disk, RAM and link, dispatch, decoding, prefill, a batch and beams, with cold and warm page cache.

    Prints the limit that the machine sets, and how much of it was reached. Leave the machine alone meanwhile.
    """
