"""Everything in memory: how fast are a token and a prompt beside plain Transformers and llama.cpp?

    python -m benchmarks.decode.peers                      # this package and plain Transformers
    python -m benchmarks.decode.peers --llama-cpp PYTHON   # and llama.cpp; see benchmarks/disk/llama_cpp.md

Two made Qwen3-MoE: one of few wide experts, where what is beside them weighs most, and one of many. Rows take turns,
each time in a process of its own; a round has each of them once. The limit is what has to be read: the weights of a
token at the bandwidth of RAM, which each process measures before and after its tokens, because a machine that is shared
may give twice as much a minute later.

Output embeddings are matrices of their own, as most MoEs have them. In bfloat16 they would be half of what a token
reads where everything else is in 4 bits, so there they are in 8 bits; llama.cpp's q4_0 has them in its q6_K, 6.6 bits.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks import MADE, RESULTS
from benchmarks.harness.job import JobFailedError, run_job
from benchmarks.harness.make_model import made_model
from benchmarks.harness.outcome import Verdict, show, write
from benchmarks.harness.shape import QUICK, Shape
from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.bench.bandwidth import RAM_BYTES, read_bandwidth
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.bench.limit import as_share, is_possible
from transformers_moe_offload.bench.tables import Table

SHAPES = {
    "wide": Shape(hidden=512, intermediate=2048, layers=8, experts=32, experts_per_token=4, is_tied=False),
    "many": Shape(hidden=2048, intermediate=1024, layers=4, experts=64, experts_per_token=8, heads=32, is_tied=False),
}
FOUR_BITS = HqqFormat(nbits=4, group_size=64, optimize=False)
EIGHT_BITS = HqqFormat(nbits=8, group_size=64, optimize=False)
OURS: dict[str, dict[str, Any]] = {
    "this package, bfloat16": {},
    "this package, 4 bits": {
        "experts": FOUR_BITS,
        "dense": FOUR_BITS,
        "lm_head": EIGHT_BITS,
        "arithmetic": "int8",
    },
}
PLAIN = "Transformers, bfloat16"
LLAMA = {"llama.cpp, bfloat16": None, "llama.cpp, q4_0": "q4_0"}
PROMISES = {
    ("many", "bfloat16"): 1.25,
    ("many", "4 bits"): 1.5,
    ("wide", "bfloat16"): 1.5,
    ("wide", "4 bits"): 2.5,
}
"""Times llama.cpp's time for a token that a row may take."""


def compare(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every row is measured.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Of a row's generation in each round.")] = 60,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt whose time is taken.")] = 512,
    llama_cpp: Annotated[Path | None, typer.Option(help="An interpreter with llama-cpp-python and gguf.")] = None,
    threads: Annotated[int | None, typer.Option(help="OMP_NUM_THREADS; default is what torch chooses.")] = None,
    made: Annotated[Path, typer.Option(help="Where made models are kept.")] = MADE,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure all rows of both shapes."""
    if quick:
        rounds, tokens, prompt = 1, 4, 16
    shapes = {"quick": replace(QUICK, intermediate=64, is_tied=False)} if quick else SHAPES
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d-%H%M", time.gmtime()),
        "conditions": conditions(made, threads),
        "lengths": {"rounds": rounds, "tokens": tokens, "prompt": prompt},
        "shapes": {},
        "failed": {},
    }
    for name, shape in shapes.items():
        folder = made_model(shape, made)
        jobs = {
            row: ("benchmarks.decode.peers:measure", {"folder": str(folder), "row": row}, {}) for row in (*OURS, PLAIN)
        }
        if llama_cpp is not None:
            jobs |= _llama_jobs(folder, made, shape, llama_cpp, threads)
        runs: dict[str, list[Any]] = {row: [] for row in jobs}
        for _ in range(rounds):
            for row, (work, job, options) in jobs.items():
                typer.echo(f"measuring {name}: {row}", err=True)
                try:
                    answer = run_job(work, {**job, "tokens": tokens, "prompt": prompt}, threads, **options)
                except JobFailedError as error:
                    result["failed"][f"{name}: {row}"] = str(error)
                    continue
                runs[row].append(answer)
        result["shapes"][name] = {"runs": {row: found for row, found in runs.items() if found}}
    result["facts"] = {name: f"{shape.name}; {rounds} rounds" for name, shape in shapes.items()} | {
        "output embedding": f"of the row 'this package, 4 bits': {EIGHT_BITS}; of 'llama.cpp, q4_0': q6_K, 6.6 bits"
    }
    show(write(results, "peers", result), result, [table(result, name) for name in shapes], verdicts(result))
    raise typer.Exit(1 if result["failed"] else 0)


def measure(folder: str, row: str, tokens: int, prompt: int) -> dict[str, Any]:
    """One process's seconds for each token, and for a prompt, with everything in memory; the bytes of a token and the
    bandwidth of RAM."""
    if row == PLAIN:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        nbytes = None
    else:
        config = OffloadConfig(cache_budget="100%", mmap=False, **OURS[row])
        model = AutoModelForCausalLM.from_pretrained(folder, moe_offload=config).eval()
        model.moe_offload.warm({layer.name: [1.0] * layer.num_experts for _, layer in sparse_layers(model)})
        nbytes = _bytes_of_a_token(model)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    token_s, prompt_s = [], []
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            prompt_s.append(time.perf_counter() - started)
        out = model(ids[:, :16], use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        bandwidth = [read_bandwidth(RAM_BYTES, 3).bytes_per_s]
        for _ in range(tokens + 5):
            started = time.perf_counter()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            token_s.append(time.perf_counter() - started)
    bandwidth.append(read_bandwidth(RAM_BYTES, 3).bytes_per_s)
    return {"token_s": token_s[5:], "prompt_s": min(prompt_s), "nbytes": nbytes, "bandwidth": bandwidth}


def _bytes_of_a_token(model: Any) -> int:
    """Weights that a token is multiplied with: all that are dense but the input embedding, and its experts."""
    embedding = model.get_input_embeddings().weight
    assert embedding is not model.get_output_embeddings().weight, "a tied head is multiplied with, too"
    nbytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()) if one is not embedding)
    plan = model.moe_offload.plan
    num_used = len(model.moe_offload.layers) * model.config.num_experts_per_tok
    return nbytes + num_used * plan.expert_bytes // plan.num_experts


def _llama_jobs(folder: Path, made: Path, shape: Shape, python: Path, threads: int | None) -> dict[str, Any]:
    """Rows of llama.cpp, whose files are written if they are not there."""
    options = {"python": str(python)}
    dense = made / f"{folder.name}.gguf"
    run_job("benchmarks.disk.gguf_model:write_gguf", {"folder": str(folder), "path": str(dense)}, threads, **options)
    jobs = {}
    for row, kind in LLAMA.items():
        path = dense if kind is None else made / f"{folder.name}-{kind}.gguf"
        if kind is not None and not path.exists():
            job = {"source": str(dense), "target": str(path)}
            run_job("benchmarks.decode.llama_cpp_resident:quantize", job, threads, **options)
        job = {"path": str(path), "vocab": shape.vocab}
        jobs[row] = ("benchmarks.decode.llama_cpp_resident:measure", job, options)
    return jobs


def table(result: dict[str, Any], shape: str) -> Table:
    """Seconds of a token and of a prompt, and the share of the memory's speed."""
    found = result["shapes"][shape]
    rows = []
    for row, runs in found["runs"].items():
        of_runs = sorted(median(run["token_s"]) for run in runs)
        nbytes = runs[0].get("nbytes")
        share = "" if nbytes is None else as_share(median(map(share_of, runs)), of="RAM")
        prompts = sorted(run["prompt_s"] for run in runs)
        rows.append(
            [
                row,
                f"{median(of_runs) * 1e3:.1f} ({of_runs[0] * 1e3:.1f}-{of_runs[-1] * 1e3:.1f})",
                "" if nbytes is None else f"{nbytes / 1e6:,.0f}",
                share,
                f"{median(prompts):.2f} ({prompts[0]:.2f}-{prompts[-1]:.2f})",
            ]
        )
    num_runs = len(next(iter(found["runs"].values())))
    speeds = [speed / 1e9 for runs in found["runs"].values() for run in runs for speed in run.get("bandwidth", ())]
    title = (
        f"{shape}: medians and extremes of {num_runs} processes; RAM gave {min(speeds):.1f} to {max(speeds):.1f} GB/s"
    )
    return Table(
        title, ["row", "ms a token", "MB a token", "of RAM's speed", f"s for {result['lengths']['prompt']}"], rows
    )


def share_of(run: dict[str, Any]) -> float:
    """Of RAM's speed, the best that the process saw, what a token of a process reached."""
    return run["nbytes"] / max(run["bandwidth"]) / median(run["token_s"])


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """What is promised of times against llama.cpp's, and that no share is above 100 %."""
    found: list[Verdict] = []
    for (shape, kind), most in PROMISES.items():
        runs = result["shapes"].get(shape, {}).get("runs", {})
        ours, theirs = runs.get(f"this package, {kind}"), runs.get(f"llama.cpp, {'q4_0' if kind == '4 bits' else kind}")
        promise = f"{shape}, {kind}: at most {most:g} times llama.cpp's time for a token"
        if not ours or not theirs:
            found.append((promise, None))
            continue
        times = median(median(run["token_s"]) for run in ours) / median(median(run["token_s"]) for run in theirs)
        found.append((f"{promise}: {times:.2f}", times <= most))
    for name, shape in result["shapes"].items():
        for row, runs in shape["runs"].items():
            if runs[0].get("nbytes") is None:
                continue
            share = max(map(share_of, runs))
            if not is_possible(share):
                found.append((f"{name}, {row}: {share:.0%} of RAM's speed, so that was measured too low", False))
    return found


if __name__ == "__main__":
    typer.run(compare)
