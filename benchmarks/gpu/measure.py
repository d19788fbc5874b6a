"""Decode and read prompts in one or several ways: the rows of `gpu.py`, each with its memory capped."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessorList

from benchmarks.decode.variants import variants
from benchmarks.gpu.accelerate import measure_accelerate
from benchmarks.gpu.bandwidth import measure_bandwidths
from benchmarks.gpu.rows import BY_NAME, FITS, Row
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.clock import StepClock, laid_down
from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.bench.passage import Passage, passage_for
from transformers_moe_offload.bench.session import facts
from transformers_moe_offload.bench.workload import Run, Workload, run
from transformers_moe_offload.errors import MoeOffloadError

RESERVE = 1 << 30
"""Bytes under a cap that are left to activations and the key-value cache."""

NO_CAP = "40%"
"""Slots where no memory is capped."""

ROW_S = 30.0
"""After so many seconds of one kind of work no further run of it begins: whole layers take minutes."""


def measure_rows(
    rows: list[str],
    folder: str,
    cap_bytes: int | None,
    dense_bytes: int,
    prompt_tokens: int,
    steps: int,
    prefills: list[int],
    runs: int,
    repeats: int,
) -> dict[str, Any]:
    """By row, what was measured or why it was not, and bandwidths if they are to be measured, `repeats` times."""
    bandwidth = measure_bandwidths(folder, repeats) if repeats else None
    lengths = {"prompt_tokens": prompt_tokens, "steps": steps}
    found = {}
    for name in rows:
        row, num_gpus = BY_NAME[name], torch.cuda.device_count()
        if row.num_gpus > max(1, num_gpus):
            found[name] = {"left_out": f"it needs {row.num_gpus} GPUs, and there are {num_gpus}"}
            continue
        with capped(None if row.budget else cap_bytes):
            try:
                if row.by_accelerate:
                    found[name] = measure_accelerate(folder, **lengths, prefills=prefills, runs=runs)
                else:
                    left = None if cap_bytes is None else row.num_gpus * (cap_bytes - RESERVE) - dense_bytes
                    budget = row.budget or left or NO_CAP
                    found[name] = measure_row(row, folder, budget, Workload(name="decode", **lengths), prefills, runs)
            except (MoeOffloadError, torch.cuda.OutOfMemoryError) as error:
                found[name] = {"left_out": f"{type(error).__name__}: {error}".splitlines()[0]}
        gc.collect()
    return {"rows": found, "bandwidth": bandwidth}


@contextmanager
def capped(cap_bytes: int | None) -> Iterator[None]:
    """No more memory of any GPU than this for torch's allocator; the CUDA context, about half a GB, comes on top."""
    gpus = range(torch.cuda.device_count())
    if gpus:
        torch.cuda.init()  # before, torch's allocator knows no GPU whose figures it could reset
    torch.cuda.empty_cache()
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if cap_bytes is None else min(1.0, cap_bytes / total), gpu)
    try:
        yield
    finally:
        for gpu in gpus:
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def measure_row(
    row: Row, folder: str, budget: int | str, decode: Workload, prefills: list[int], runs: int
) -> dict[str, Any]:
    """One way of decoding with this package."""
    started = time.perf_counter()
    placed: dict[str, Any] = {} if row.num_gpus == 1 else {"device_map": "balanced"}
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config_of(row, budget), **placed).eval()
    if row.variant is not None:
        _variant(row.variant).apply(model)
    answer: dict[str, Any] = {"load_s": time.perf_counter() - started, "model": facts(model)}
    passage = passage_for(model, folder)
    answer["passage"] = passage.source
    longest = model.config.get_text_config().max_position_embeddings - 1
    answer["prefill"] = {
        str(length): repeated(model, Workload(name="prefill", prompt_tokens=length), passage, runs, {})
        for length in prefills
        if length <= longest
    }
    answer["decode"] = repeated(model, decode, passage, runs, keywords(row))
    generation = keywords(row) | {"cache_implementation": "static"}
    host_us, digest = watched(model, decode, passage, generation, is_timed=not row.is_compiled)
    answer |= {"host_us_per_layer": host_us, "digest": digest if row.is_exact else None}
    answer["decoding"] = how_it_decodes(model, row)
    answer["memory"] = peak_memory(model)
    model.moe_offload.close()
    return answer


def config_of(row: Row, budget: int | str) -> OffloadConfig:
    """How a row has its model loaded."""
    if row.variant is not None:
        return _variant(row.variant).config(budget)
    options = dict(row.options)
    if torch.cuda.is_available() or row.is_on_device:
        options["host_budget"] = FITS  # the disk is none of these rows' business
    return OffloadConfig(cache_budget=budget, **options)


def _variant(name: str) -> Any:
    return next(one for one in variants() if one.name == name)


def repeated(
    model: Any, work: Workload, passage: Passage, runs: int, generation: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One run that is not counted, then those that are: one at least. A single one is counted as it is."""
    if runs > 1:
        run(model, work, passage, generation=generation)
    done: list[Run] = []
    ends = time.monotonic() + ROW_S
    while not done or (len(done) < runs and time.monotonic() < ends):
        done.append(run(model, work, passage, generation=generation))
    return [asdict(one) for one in done]


def keywords(row: Row) -> dict[str, Any]:
    """Of `generate`. Transformers asks for a compiled step, in place of which a captured one is, on GPUs; on a CPU only
    if it is told to."""
    config = compile_config(row)
    return dict(row.generation) | ({"compile_config": config} if row.generation and config is not None else {})


def compile_config(row: Row) -> CompileConfig | None:
    """How a row's steps are compiled; without a GPU only as far as that needs no compiler."""
    if torch.cuda.is_available():
        return CompileConfig() if row.is_compiled else None
    config = CompileConfig(backend="aot_eager" if row.is_compiled else "eager", mode=None)
    config._compile_all_devices = True
    return config


def watched(
    model: Any, work: Workload, passage: Passage, generation: Mapping[str, Any], *, is_timed: bool
) -> tuple[float | None, str]:
    """Microseconds that the host spends in a sparse layer's experts module, and a digest of the logits of all steps.

    In a run of its own, and with a static cache whatever the row, so that attention is the same for all. Where the host
    decides, its time includes waiting for the routing. In a replayed graph the modules are not called at all, and
    `torch.compile` would compile what takes the time with them.
    """
    calls_s: list[float] = []
    found = hashlib.sha256()

    def timed(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = forward(*args, **kwargs)
            calls_s.append(time.perf_counter() - started)
            return out

        return call

    def between(step: int, scores: Tensor) -> None:
        if step == 0:
            calls_s.clear()  # those of the prompt
        found.update(scores.float().cpu().numpy().tobytes())  # sync: device -> host

    sequences = passage.sequences(1, work.prompt_tokens + work.steps + 1)
    prompt, following = sequences.split([work.prompt_tokens, work.steps + 1], dim=1)
    layers = sparse_layers(model) if is_timed else []
    for module, _ in layers:
        module.forward = timed(module.forward)
    try:
        with torch.inference_mode():
            model.generate(
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt).to(model.device),
                max_new_tokens=work.steps + 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([StepClock(laid_down(following), between)]),
                pad_token_id=0,
                **generation,
            )
    finally:
        for module, _ in layers:
            del module.forward
    us_per_layer = sum(calls_s) / work.steps / len(layers) * 1e6 if is_timed else None
    return us_per_layer, found.hexdigest()


def how_it_decodes(model: Any, row: Row) -> dict[str, int]:
    """What became of `decode`: devices whose experts are read by address, and steps that were replayed."""
    captures = row.options.get("decode") == "graph"
    step = model.get_compiled_call(compile_config(row)) if captures else None
    return {
        "devices": len(model.moe_offload.decoding.engines),
        "steps_captured": step.num_captured if step else 0,
        "steps_replayed": step.num_replayed if step else 0,
    }


def peak_memory(model: Any) -> dict[str, int | None]:
    """Bytes of GPU memory, of the fullest GPU, and of page-locked host memory; None where there is no GPU."""
    if not torch.cuda.is_available():
        return {"gpu_bytes": None, "pinned_bytes": None}
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) + model.moe_offload.plan.arena_bytes
    of_gpus = map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
    return {"gpu_bytes": max(of_gpus), "pinned_bytes": pinned}
