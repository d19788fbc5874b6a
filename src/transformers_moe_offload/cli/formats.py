"""Parse the options that give experts and the dense part their formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers_moe_offload.cli.failures import CommandError
from transformers_moe_offload.cli.options import load_trace
from transformers_moe_offload.config import ExpertFormats, HqqFormat
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.hf.loading.meta_model import MetaModel
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.tracing.trace import parse_share


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What the options for formats ask for."""

    experts: ExpertFormats | None
    """None if no option asks for any."""
    dense: HqqFormat | None
    lm_head: HqqFormat | None
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
    lm_head: str | None,
    *,
    optimize: bool = True,
) -> Formats:
    """The formats of all experts, by layer and by use, of the dense part, and of the output embedding."""
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
        experts=asked if is_any else None,
        dense=_format("--dense", dense, optimize),
        lm_head=_format("--lm-head", lm_head, optimize),
        trace=trace,
        traced=traced,
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
