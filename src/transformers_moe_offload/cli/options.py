"""Parse options that several subcommands take, and load the model and the trace that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.config import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.errors import ConfigError, MoeOffloadError
from transformers_moe_offload.hf.loading.meta_model import MetaModel, read_config
from transformers_moe_offload.routing import RoutingTrace
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.tracing.trace import parse_share
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


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What the options for formats ask for."""

    experts: ExpertFormats | None
    """None if no option asks for any."""
    dense: HqqFormat | None
    trace: Path | None
    traced: tuple[int, ...]
    """Experts with weights of each sparse layer that `trace` was recorded with."""

    def expect_traced(self, model: MetaModel) -> None:
        """Raise `CommandError` unless the trace, if there is one, is of a model with so many experts in each layer."""
        num_experts = tuple(spec.num_experts for spec in model.experts)
        if self.trace is not None and self.traced != num_experts:
            raise CommandError(
                f"{self.trace} was recorded with {_described(self.traced)}, but {model.name} has "
                f"{_described(num_experts)}; record one with `moe-offload trace {model.name}`"
            )


def parse_formats(
    experts: str | None,
    layers: Sequence[str] | None,
    hot: str | None,
    trace: Path | None,
    hot_share: str | None,
    dense: str | None,
    *,
    optimize: bool = True,
) -> Formats:
    """The formats of all experts, by layer and by use, and of the dense part."""
    by_layer = {}
    for option in layers or []:
        key, is_given, text = option.partition("=")
        if not is_given:
            raise CommandError(f"--layers {option!r} names no format; write sparse layers and a format as 0-3=4x64")
        by_layer[key.strip()] = _format(f"--layers {option!r}:", text, optimize)
    if hot is None and (trace is not None or hot_share is not None):
        raise CommandError("--trace and --hot-share choose hot experts, but there is no --hot that gives their format")
    if hot is not None and trace is None:
        raise CommandError(f"--hot {hot} needs a --trace that tells which experts are used most")
    hot_experts, traced = ({}, ()) if trace is None else _hottest(trace, hot_share or "10%")
    asked = ExpertFormats(
        default=_format("--experts", experts, optimize),
        layers=by_layer,
        hot=_format("--hot", hot, optimize),
        hot_experts=hot_experts,
    )
    is_any = experts is not None or by_layer or hot is not None
    return Formats(
        experts=asked if is_any else None, dense=_format("--dense", dense, optimize), trace=trace, traced=traced
    )


def _format(option: str, text: str | None, optimize: bool) -> HqqFormat | None:
    """A format as `4x64`; None, or `none`, leaves weights as they are. `option` begins the error."""
    if text is None or text.strip() == "none":
        return None
    with _named(option):
        return replace(HqqFormat.parse(text), optimize=optimize)


def _hottest(trace: Path, share: str) -> tuple[dict[str, list[int]], tuple[int, ...]]:
    """The experts that a trace saw most, and how many each of its layers has."""
    with _named("--hot-share"):
        number = parse_share(share)
    found = load_trace(trace)
    if isinstance(found, Trace):
        return found.hottest(number), found.num_experts
    return found.hottest(number), tuple(facts.num_with_weights for _, _, facts in found.sparse_layers())


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Begin an error of ours about a typed value with the option that it was typed for."""
    try:
        yield
    except MoeOffloadError as error:
        raise CommandError(f"{option} {error}") from error


def _described(num_experts: Sequence[int]) -> str:
    counts = "/".join(str(count) for count in sorted(set(num_experts)))
    return f"{len(num_experts)} sparse layers of {counts} experts"
