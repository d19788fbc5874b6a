"""Parse options that several subcommands take, and pass them to `from_pretrained`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.errors import ConfigError


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
    """The name, after a check that it can be used if it is a device; Transformers reads other names."""
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
        raise CommandError(f"{option} {name!r} is not a device; this machine has {_devices()}") from error
    try:
        torch.zeros(1, device=name).tolist()  # raises for "meta", whose tensors have no data
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts that it has it
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CommandError(f"{option} {name} cannot be used here: {reason}; this machine has {_devices()}") from error


def _devices() -> str:
    return ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
