"""Arguments and options that several subcommands take, and how they reach `from_pretrained`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from transformers_moe_offload.errors import ConfigError

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
Arithmetic = Annotated[str, typer.Option(help="'fast', 'exact': bit for bit what Transformers computes, or 'int8'.")]
DeviceMap = Annotated[str | None, typer.Option(help="As in from_pretrained: 'auto', 'cpu', 'cuda:1', ...")]
Dtype = Annotated[str, typer.Option(help="'auto' (as stored), or a torch dtype such as 'bfloat16'.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Access token of the Hub; default is the one you are logged in with.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the Hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: the keywords that configs, tokenizers and models are read with."""

    revision: str
    token: str | None
    local_files_only: bool
    trust_remote_code: bool

    def for_files(self) -> dict[str, Any]:
        """The keywords for plain files, which run no code."""
        return {name: value for name, value in asdict(self).items() if name != "trust_remote_code"}

    def for_classes(self) -> dict[str, Any]:
        """The keywords for everything that has a class of its own."""
        return asdict(self)


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for `auto`."""
    if name == "auto":
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"dtype={name!r} is not 'auto', 'float32', 'bfloat16', 'float16' or another floating torch dtype"
        )
    return dtype
