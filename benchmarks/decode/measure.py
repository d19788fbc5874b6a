"""Measure one row: load the model, decode with a warm and with a cold page cache, or while memory is capped.

Warm: all files that the row reads are read once before each run. Cold: they are dropped from the page cache before
every single token, as if the model were too large for the page cache to keep any of it.
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
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList

from benchmarks.decode.loading import FetchCounter, load
from benchmarks.decode.protocol import Protocol
from benchmarks.decode.rows import Row
from benchmarks.harness.counters import Reads, forget_peak, peak_rss
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.bandwidth import disk_bandwidth, expert_ranges
from transformers_moe_offload.bench.clock import StepClock, laid_down
from transformers_moe_offload.bench.layers import store_of
from transformers_moe_offload.bench.page_cache import drop, resident_share, warm
from transformers_moe_offload.disk_io.reader_pool import default_workers


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

    digest = run(model, protocol, fetched)["digest"]
    runs: dict[str, list[dict[str, Any]]] = {"warm": [], "cold": []}
    for _ in range(protocol.runs):
        warm(read_while_decoding)
        runs["warm"].append(run(model, protocol, fetched))
    peak = max(load_peak_rss, peak_rss())
    unmap(model)
    for _ in range(protocol.runs):
        runs["cold"].append(run(model, protocol, fetched, before_token=lambda: drop(read_while_decoding)))
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
        **plan_of(model),
    }


def measure_under_cap(row: dict[str, Any], folder: str, scratch: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """Runs of one row while memory is capped; the first is not counted.

    The page cache starts empty and keeps what the cap lets it keep.
    """
    lengths = Protocol(**protocol)
    model = load(Row(**row), Path(folder), Path(scratch)).eval()
    os.sync()  # what accelerate has written must be on the disk before it can be dropped from the page cache
    drop([*sorted(Path(folder).glob("*.safetensors")), *(file for file in Path(scratch).rglob("*") if file.is_file())])
    fetched = FetchCounter(model)
    run(model, lengths, fetched)
    runs = [run(model, lengths, fetched) for _ in range(lengths.runs)]
    return {"capped": runs, **plan_of(model)}


def measure_bandwidth(folder: str, repeats: int) -> dict[str, Any]:
    """Bytes of experts per second, cold from the disk and warm from the page cache.

    With as many threads as the package reads with.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(cache_budget="10%"))
    return disk_bandwidth(expert_ranges(store_of(model)), default_workers(), repeats)


def unmap(model: Any) -> None:
    """Copy parameters that Transformers left where they are in the files: what is dropped is to be experts only."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.clone()


def plan_of(model: Any) -> dict[str, int]:
    """Bytes that stay in RAM: parameters, and the cache if there is one."""
    dense = {id(tensor): tensor for tensor in model.parameters() if tensor.device.type != "meta"}
    facts = {"resident_parameter_bytes": sum(tensor.nbytes for tensor in dense.values())}
    if hasattr(model, "moe_offload"):
        plan = model.moe_offload.plan
        facts |= {"cache_bytes": plan.cache_bytes, "slots": plan.num_slots}
        facts |= {"is_mapped": all(pool.is_mapped for pool in plan.pools)}
    return facts


def run(
    model: Any, protocol: Protocol, fetched: FetchCounter, before_token: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """One prompt and its tokens; what is measured begins when the prompt has been read."""
    random = torch.Generator().manual_seed(protocol.seed)
    vocab = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocab, (1, protocol.prompt_tokens), generator=random)
    tokens = torch.randint(vocab, (1, protocol.decode_tokens + 1), generator=random)
    watch = _Watch(model, fetched, protocol.decode_tokens, before_token)
    clock = StepClock(laid_down(tokens), watch.between)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens.shape[1],
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
            pad_token_id=0,
        )
    assert torch.equal(out[:, protocol.prompt_tokens :], tokens)
    figures = {"tokens": len(clock.step_s), "elapsed_s": sum(clock.step_s), "token_s": clock.step_s}
    return figures | watch.figures()


class _Watch:
    """Counts what happens while the clock runs, and takes a digest of all logits."""

    def __init__(self, model: Any, fetched: FetchCounter, last_step: int, before_token: Callable[[], None]) -> None:
        self._runtime = getattr(model, "moe_offload", None)
        self._fetched = fetched
        self._last_step = last_step
        self._before_token = before_token
        self._digest = hashlib.sha256()
        self._reads = Reads(0, 0)

    def between(self, step: int, scores: Tensor) -> None:
        """The clock stands still: scores (1, V) float32 are those of a step."""
        if step == 0:
            self._forget_the_prompt()
        else:
            self._reads += Reads.now().since(self._reads_before)
        self._digest.update(scores.numpy().tobytes())
        if step < self._last_step:
            self._before_token()
        self._reads_before = Reads.now()

    def figures(self) -> dict[str, Any]:
        """What was counted between the prompt and the last token."""
        figures: dict[str, Any] = asdict(self._reads)
        figures |= {"fetched_bytes": self._fetched.nbytes, "digest": self._digest.hexdigest()}
        if self._runtime is not None:
            stats = self._runtime.stats()
            names = ("hits", "late_hits", "misses", "disk_bytes", "stall_ms")
            figures |= {name: getattr(stats, name) for name in names}
        return figures

    def _forget_the_prompt(self) -> None:
        if self._runtime is not None:
            self._runtime.reset_stats()
        self._fetched.nbytes = 0
