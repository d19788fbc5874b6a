"""Parse the options for the formats of experts: of all, by layer, and of those that are used most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.recorded import load_either, num_experts_of
from transformers_moe_offload.config import ExpertFormats, HqqFormat
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.tracing.use import parse_share


def parse_format(option: str, text: str | None, *, optimize: bool = True) -> HqqFormat | None:
    """A format as `4x64`; None, or `none`, leaves weights as they are. `option` begins the error."""
    if text is None or text.strip() == "none":
        return None
    with _named(option):
        return replace(HqqFormat.parse(text), optimize=optimize)


def parse_formats(
    experts: str | None,
    layers: Sequence[str] | None,
    hot: str | None,
    trace: Path | None,
    hot_share: str | None,
    *,
    optimize: bool = True,
) -> ExpertFormats | None:
    """The formats of all experts; None if no option asks for any."""
    by_layer = {}
    for option in layers or []:
        key, is_given, text = option.partition("=")
        if not is_given:
            raise CommandError(f"--layers {option!r} names no format; write sparse layers and a format as 0-3=4x64")
        by_layer[key.strip()] = parse_format(f"--layers {option!r}:", text, optimize=optimize)
    if hot is None and (trace is not None or hot_share is not None):
        raise CommandError("--trace and --hot-share choose hot experts, but there is no --hot that gives their format")
    if hot is not None and trace is None:
        raise CommandError(f"--hot {hot} needs a --trace that tells which experts are used most")
    if experts is None and not by_layer and hot is None:
        return None
    return ExpertFormats(
        default=parse_format("--experts", experts, optimize=optimize),
        layers=by_layer,
        hot=parse_format("--hot", hot, optimize=optimize),
        hot_experts={} if trace is None else _hottest(trace, hot_share or "10%"),
    )


def _hottest(trace: Path, share: str) -> dict[str, list[int]]:
    with _named("--hot-share"):
        number = parse_share(share)
    return load_either(trace).hottest(number)


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Begin an error of ours about a typed value with the option that it was typed for."""
    try:
        yield
    except MoeOffloadError as error:
        raise CommandError(f"{option} {error}") from error


def expect_same_experts(trace: Path | None, name: str, num_experts: Sequence[int]) -> None:
    """Raise `CommandError` unless a trace is of a model with so many experts in each sparse layer."""
    if trace is None:
        return
    traced = num_experts_of(trace)
    if traced != tuple(num_experts):
        raise CommandError(
            f"{trace} was recorded with {_described(traced)}, but {name} has {_described(num_experts)}; record one "
            f"with `moe-offload trace {name}`"
        )


def _described(num_experts: Sequence[int]) -> str:
    counts = "/".join(str(count) for count in sorted(set(num_experts)))
    return f"{len(num_experts)} sparse layers of {counts} experts"
