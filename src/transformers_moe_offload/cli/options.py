"""Arguments and options that several subcommands take, and how they reach `from_pretrained`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from transformers_moe_offload.cli.failures import CommandError
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


def parse_device_map(name: str | None) -> str | None:
    """The same, once it is known that a device named so can be used; what is no device, Transformers reads."""
    try:
        torch.device(name or "cpu")
    except RuntimeError:  # 'auto', or misspelt
        return name
    if name is not None:
        expect_device("--device-map", name)
    return name


def expect_device(option: str, name: str) -> None:
    """Raise `CommandError` unless this machine has the device, before anything is read for it."""
    try:
        torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"{option} {name!r} is no device; this machine has {_devices()}") from error
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts that it has it
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CommandError(f"{option} {name} cannot be used here: {reason}; this machine has {_devices()}") from error


def _devices() -> str:
    return ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
