"""Parse the options that say where a model comes from and how it is loaded, and load it, its tokenizer or a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.hf.loading.meta_model import read_config
from transformers_moe_offload.routing import RoutingTrace
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.untrusted import reading


class Hub(TypedDict):
    """How to ask the Hub."""

    token: str | None
    local_files_only: bool


class Commit(Hub):
    """Where a checkpoint comes from."""

    revision: str


class Origin(Commit):
    """Where a model comes from, as the keywords of every `from_pretrained`."""

    trust_remote_code: bool


class Loading(Origin):
    """Where a model comes from, and how it is loaded."""

    dtype: str
    device_map: str | None


def parse_loading(typed: Loading) -> tuple[Origin, dict[str, Any]]:
    """The keywords of every `from_pretrained`, and all those of a model's."""
    loading: dict[str, Any] = {**typed}
    loading["dtype"] = parse_dtype(typed["dtype"]) or "auto"
    loading["device_map"] = parse_device_map(typed["device_map"])
    origin: Any = {name: value for name, value in typed.items() if name in Origin.__annotations__}
    return origin, loading


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


def load_tokenizer(name: str, **origin: Any) -> Any:
    """The tokenizer of a model, after its config; `origin` is what `from_pretrained` takes."""
    read_config(name, f"cannot load {name!r}", **origin)
    with reading(f"cannot load {name!r}"):
        return AutoTokenizer.from_pretrained(name, **origin)


@contextmanager
def loaded(name: str, config: OffloadConfig, **options: Any) -> Iterator[Any]:
    """The offloaded model, inside the block; `options` is what `from_pretrained` takes."""
    with reading(f"cannot load {name!r}"):
        model = AutoModelForCausalLM.from_pretrained(name, moe_offload=config, **options)
    try:
        yield model
    finally:
        model.moe_offload.close()


def load_trace(path: Path) -> Trace | RoutingTrace:
    """What `TRACE` and `--trace` name: the file of a trace, or the folder of a recording of the routing."""
    return RoutingTrace.load(path) if path.is_dir() else Trace.load(path)
