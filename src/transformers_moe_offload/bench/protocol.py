"""How much is measured: lengths, repetitions, and how these are shortened for models with few positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers_moe_offload.bench.workload import Workload
from transformers_moe_offload.errors import ConfigError


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
