"""The work that a model does while it is measured, how much of it there is, and one run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from transformers_moe_offload.bench.clock import Restrict, StepClock, among, laid_down
from transformers_moe_offload.bench.layers import sparse_layers, store_of
from transformers_moe_offload.bench.passage import Passage
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId

CANDIDATES_PER_BEAM = 4
"""Tokens per beam that an untrained model may choose among; beam search itself needs two."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of work. `steps` is 0 where the prefill is measured."""

    name: str
    prompt_tokens: int
    steps: int = 0
    batch: int = 1
    beams: int = 1

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is measured, and not the tokens after it."""
        return self.steps == 0

    @property
    def tokens(self) -> int:
        """Tokens by which the seconds of a run are divided to get a speed; beams are steps of one sequence."""
        return self.batch * (self.prompt_tokens if self.is_prefill else self.steps)

    @property
    def forwards(self) -> int:
        """Forwards that are measured."""
        return max(1, self.steps)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Medians are taken over `runs`, after one run that is not counted.

    A row that takes long has fewer: after `row_s` seconds no further run begins, once there are two.
    """

    prompt_tokens: int = 16
    """Before the tokens that are decoded."""
    decode_tokens: int = 16
    prefill_tokens: tuple[int, ...] = (128, 512, 2048)
    batch: int = 8
    beams: int = 5
    runs: int = 5
    row_s: float = 10.0
    dispatch_passes: int = 50
    bandwidth_repeats: int = 3


QUICK = Protocol(decode_tokens=4, prefill_tokens=(128,), runs=1, dispatch_passes=3, bandwidth_repeats=1)
"""Every measurement once; the figures mean little."""


def workloads(protocol: Protocol, max_positions: int | None) -> tuple[list[Workload], list[str]]:
    """What to measure, and notes on what is shortened because the model has no more positions."""
    decoding = protocol.prompt_tokens + protocol.decode_tokens + 1
    if max_positions is not None and max_positions < decoding:
        raise ConfigError(
            f"the model has {max_positions} positions, but decoding is measured over {decoding}; "
            f"it is too short to be measured"
        )
    lengths = [min(tokens, max_positions or tokens) for tokens in protocol.prefill_tokens]
    notes = [
        f"prefill of {tokens} tokens: the model has {length} positions, so {length} tokens are measured instead"
        for tokens, length in zip(protocol.prefill_tokens, lengths, strict=True)
        if length < tokens
    ]
    common = {"prompt_tokens": protocol.prompt_tokens, "steps": protocol.decode_tokens}
    return [
        Workload(name="decode", **common),
        *(Workload(name=f"prefill {length}", prompt_tokens=length) for length in dict.fromkeys(lengths)),
        Workload(name=f"batch {protocol.batch}", batch=protocol.batch, **common),
        Workload(name=f"beam {protocol.beams}", beams=protocol.beams, **common),
    ], notes


def max_positions(model: Any) -> int | None:
    """How many positions the model has; None where its config does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class Run:
    """Times and counts of one run. Counts are those of the measured forwards."""

    elapsed_s: float
    forward_s: list[float]
    asked: int
    hits: int
    late_hits: int
    misses: int
    prefetch_used: int
    prefetch_wasted: int
    disk_bytes: int
    device_bytes: int
    stall_ms: float
    needed_bytes: int
    """Bytes of the experts that were asked for and had to be loaded, ahead of time or not."""
    layer_misses: list[int] = field(default_factory=list)


_COUNTED = (
    "asked",
    "hits",
    "late_hits",
    "misses",
    "prefetch_used",
    "prefetch_wasted",
    "disk_bytes",
    "device_bytes",
    "stall_ms",
)
"""The fields of `Run` that `CacheStats` has, too."""


def run(
    model: Any,
    workload: Workload,
    passage: Passage,
    before_forward: Callable[[], None] = lambda: None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """Do the work once; `before_forward` is called before every measured forward, while the clock stands still.

    `generation` are further keywords of `generate`.
    """
    runtime = model.moe_offload
    sequences = passage.sequences(workload.batch, workload.prompt_tokens + workload.steps + 1)
    prompt = sequences[:, : workload.prompt_tokens].to(model.device)

    def between(step: int, scores: Tensor) -> None:
        if step == 0 and not workload.is_prefill:
            runtime.reset_stats()
        if step < workload.steps:
            before_forward()

    clock = StepClock(_restriction(workload, passage, sequences[:, workload.prompt_tokens :]), between)
    if workload.is_prefill:
        runtime.reset_stats()
        before_forward()
    with torch.inference_mode():
        clock.start()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=workload.steps + 1,
            max_new_tokens=workload.steps + 1,
            do_sample=False,
            num_beams=workload.beams,
            logits_processor=LogitsProcessorList([clock]),
            pad_token_id=0,
            **generation,
        )
    seconds = [clock.first_s] if workload.is_prefill else clock.step_s
    assert len(seconds) == workload.forwards
    return _run_of(model, seconds)


def seconds_per_forward(runs: list[Run]) -> float:
    """Median over the runs of the mean over a run's forwards."""
    return median(one.elapsed_s / len(one.forward_s) for one in runs)


def _restriction(workload: Workload, passage: Passage, following: Tensor) -> Restrict:
    """A single sequence follows the text. Beams choose freely, but among few tokens where the model is untrained:
    otherwise it would repeat one of them."""
    if workload.beams == 1:
        return laid_down(following)
    if passage.is_text:
        return lambda step, scores: scores
    count = CANDIDATES_PER_BEAM * workload.beams
    return among(passage.sequences(1, (workload.steps + 1) * count).view(-1, count))


def _run_of(model: Any, seconds: list[float]) -> Run:
    stats, store = model.moe_offload.stats(), store_of(model)
    needed_bytes, misses = 0, []
    for _, layer in sparse_layers(model):
        counts = stats.per_layer[layer.name]
        needed_bytes += (counts.misses + counts.prefetch_used) * store.stored_bytes(ExpertId(layer.index, 0))
        misses.append(counts.misses)
    return Run(
        elapsed_s=sum(seconds),
        forward_s=seconds,
        needed_bytes=needed_bytes,
        layer_misses=misses,
        **{name: getattr(stats, name) for name in _COUNTED},
    )
