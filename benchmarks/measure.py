"""Measure one row: load the model, decode with a warm and with a cold page cache.

Warm: all files that the row reads are read once before each run. Cold: they are dropped from the page cache before
every single token, as if the model were too large for the page cache to keep any of it.

    python benchmarks/measure.py '{"row": {...}, "folder": "...", "scratch": "...", "protocol": {...}}' answer.json
"""

# V vocabulary

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - so that the baseline includes it
from counters import Reads, forget_peak, peak_rss
from job import serve
from loading import FetchCounter, load
from page_cache import drop, resident_share, warm
from protocol import Protocol
from rows import Row
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


def measure(row: dict[str, Any], folder: str, scratch: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """Everything that is to be known of one row."""
    return _measure(Row(**row), Path(folder), Path(scratch), Protocol(**protocol))


def _measure(row: Row, folder: Path, scratch: Path, protocol: Protocol) -> dict[str, Any]:
    baseline_rss = peak_rss()
    checkpoint = sorted(folder.glob("*.safetensors"))
    drop(checkpoint)
    forget_peak()
    started, before = time.perf_counter(), Reads.now()
    model = load(row, folder, scratch).eval()
    load_s, load_reads = time.perf_counter() - started, Reads.now().since(before)
    load_peak_rss = peak_rss()
    os.sync()  # what accelerate has written must be on the disk before it can be dropped from the page cache
    copies = sorted(scratch.rglob("*")) if row.kind == "accelerate" else []
    copies = [file for file in copies if file.is_file()]
    read_while_decoding = copies or checkpoint
    fetched = FetchCounter(model)

    digest = _run(model, protocol, fetched)["digest"]
    runs: dict[str, list[dict[str, Any]]] = {"warm": [], "cold": []}
    for _ in range(protocol.runs):
        warm(read_while_decoding)
        runs["warm"].append(_run(model, protocol, fetched))
    peak = max(load_peak_rss, peak_rss())
    _unmap(model)
    for _ in range(protocol.runs):
        runs["cold"].append(_run(model, protocol, fetched, before_token=lambda: drop(read_while_decoding)))
    drop(read_while_decoding)
    return {
        "load_s": load_s,
        "load_read_bytes": load_reads.read_bytes,
        "baseline_rss": baseline_rss,
        "load_peak_rss": load_peak_rss,
        "peak_rss": peak,
        "copied_bytes": sum(file.stat().st_size for file in copies),
        "cached_share_after_drop": resident_share(read_while_decoding),
        "torch_threads": torch.get_num_threads(),
        "digest": digest,
        **runs,
        **_plan_of(model),
    }


def _unmap(model: Any) -> None:
    """Copy parameters that Transformers left where they are in the files: what is dropped is to be experts only."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.clone()


def _plan_of(model: Any) -> dict[str, int]:
    dense = {id(tensor): tensor for tensor in model.parameters() if tensor.device.type != "meta"}
    facts = {"resident_parameter_bytes": sum(tensor.nbytes for tensor in dense.values())}
    if hasattr(model, "moe_offload"):
        facts |= {"cache_bytes": model.moe_offload.plan.cache_bytes, "slots": model.moe_offload.plan.num_slots}
    return facts


def _run(
    model: Any, protocol: Protocol, fetched: FetchCounter, before_token: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """One prompt and its tokens; what is measured begins when the prompt has been read."""
    random = torch.Generator().manual_seed(protocol.seed)
    vocab = model.config.vocab_size
    prompt = torch.randint(vocab, (1, protocol.prompt_tokens), generator=random)
    tokens = torch.randint(vocab, (protocol.decode_tokens + 1,), generator=random).tolist()
    clock = _Clock(tokens, model, fetched, before_token)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(tokens),
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
            pad_token_id=0,
        )
    assert out[0, protocol.prompt_tokens :].tolist() == tokens
    return clock.figures()


class _Clock(LogitsProcessor):
    """Called by `generate` after every forward: stops the clock, lays down the next token, starts the clock again."""

    def __init__(self, tokens: list[int], model: Any, fetched: FetchCounter, before_token: Callable[[], None]) -> None:
        self._tokens = tokens
        self._step = 0
        self._runtime = getattr(model, "moe_offload", None)
        self._fetched = fetched
        self._before_token = before_token
        self._digest = hashlib.sha256()
        self._token_s: list[float] = []
        self._reads = Reads(0, 0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (1, V) float32 -> scores under which greedy choice can only take the token laid down."""
        if self._step == 0:
            self._forget_the_prompt()
        else:
            self._token_s.append(time.perf_counter() - self._started)
            self._reads += Reads.now().since(self._reads_before)
        self._digest.update(scores.numpy().tobytes())
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self._tokens[self._step]] = 0.0
        self._step += 1
        if self._step < len(self._tokens):
            self._before_token()
        self._reads_before = Reads.now()
        self._started = time.perf_counter()
        return forced

    def figures(self) -> dict[str, Any]:
        """What was measured between the prompt and the last token, and a digest of all logits."""
        figures = {"tokens": len(self._token_s), "elapsed_s": sum(self._token_s), "token_s": self._token_s}
        figures |= asdict(self._reads) | {"fetched_bytes": self._fetched.nbytes, "digest": self._digest.hexdigest()}
        if self._runtime is not None:
            stats = self._runtime.stats()
            names = ("hits", "late_hits", "misses", "disk_bytes", "stall_ms")
            figures |= {name: getattr(stats, name) for name in names}
        return figures

    def _forget_the_prompt(self) -> None:
        if self._runtime is not None:
            self._runtime.reset_stats()
        self._fetched.nbytes = 0


if __name__ == "__main__":
    serve(measure)
