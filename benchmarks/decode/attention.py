"""How long does the newest token take to attend to all tokens of its text, beside torch's `sdpa`? And to be put into
the cache, beside Transformers' own?

    python -m benchmarks.decode.attention          # half a minute
    python -m benchmarks.decode.attention --quick  # every line of it once, figures without meaning

One text in bfloat16, with the output matrix that follows, on torch's number of threads. Both take turns; the best of
five turns counts; of a cache the mean of 20 tokens, memory for more of them included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional
from transformers import DynamicCache

from benchmarks import RESULTS
from benchmarks.harness.outcome import Verdict, show, write
from transformers_moe_offload.bench.bandwidth import best_s
from transformers_moe_offload.bench.conditions import conditions
from transformers_moe_offload.bench.tables import Table
from transformers_moe_offload.hf.few_rows.kept_tokens import extended
from transformers_moe_offload.kernels.attention import Attention, AttentionKernel
from transformers_moe_offload.kernels.few_rows import linear

HEADS = {
    "32 heads of 64, 4 of keys": (32, 4, 64),
    "32 heads of 128, 4 of keys": (32, 4, 128),
    "32 heads of 128": (32, 32, 128),
}
"""Name -> heads of queries, heads of keys and values, columns of a head."""

TOKENS = (64, 1024, 4096, 16384)
HIDDEN = 2048
NUM_PUT = 20


def compare(
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens, one turn.")] = False,
    results: Annotated[Path, typer.Option(help="Where results are written.")] = RESULTS,
) -> None:
    """Measure all numbers of heads and tokens."""
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d-%H%M", time.gmtime()),
        "conditions": conditions(results, None),
        "rows": [
            {"heads": name, "tokens": tokens, **measure(*heads, tokens, 1 if quick else 5)}
            for name, heads in HEADS.items()
            for tokens in (TOKENS[:1] if quick else TOKENS)
        ],
    }
    show(write(results, "attention", result), result, [table(result)], verdicts(result))


def measure(heads: int, kv_heads: int, head_dim: int, tokens: int, turns: int) -> dict[str, float]:
    """Seconds of both ways for one layer's output."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    matrices = [draw(count * head_dim, HIDDEN) for count in (heads, kv_heads, kv_heads)] + [
        draw(HIDDEN, heads * head_dim)
    ]
    attention = Attention(head_dim, (head_dim,), head_dim**-0.5, (None, None))
    kernel = AttentionKernel(attention, [(matrix, None) for matrix in matrices])
    queries, keys, values = (
        draw(1, heads, 1, head_dim),
        draw(1, kv_heads, tokens, head_dim),
        draw(1, kv_heads, tokens, head_dim),
    )

    def by_torch() -> None:
        found = functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=heads != kv_heads)
        linear(found.transpose(1, 2).reshape(1, 1, -1), matrices[3])

    ours, theirs = [], []
    with torch.inference_mode():
        for _ in range(turns):
            ours.append(best_s(lambda: kernel.attend(queries, keys, values), 3))
            theirs.append(best_s(by_torch, 3))
        put = min(put_in_s(extended, keys, values) for _ in range(turns))
        update = min(put_in_s(DynamicCache.update, keys, values) for _ in range(turns))
    return {
        "ours_s": min(ours),
        "torch_s": min(theirs),
        "put_s": put,
        "update_s": update,
        "nbytes": keys.nbytes + values.nbytes,
    }


def put_in_s(update: Callable[..., Any], keys: torch.Tensor, values: torch.Tensor) -> float:
    """Seconds to put one more token into a cache that has these, keys and values (1, M, S, D)."""
    cache = DynamicCache()
    cache.update(keys, values, 0)
    started = time.perf_counter()
    for _ in range(NUM_PUT):
        update(cache, keys[:, :, :1], values[:, :, :1], 0)
    return (time.perf_counter() - started) / NUM_PUT


def table(result: dict[str, Any]) -> Table:
    """Microseconds of a layer."""
    rows = [
        [
            row["heads"],
            f"{row['tokens']:,}",
            f"{row['nbytes'] / 1e6:.1f}",
            f"{row['ours_s'] * 1e6:,.0f}",
            f"{row['torch_s'] * 1e6:,.0f}",
            f"{row['torch_s'] / row['ours_s']:.1f}",
            f"{row['put_s'] * 1e6:,.0f}",
            f"{row['update_s'] * 1e6:,.0f}",
        ]
        for row in result["rows"]
    ]
    return Table(
        "One token attends, in microseconds a layer",
        [
            "heads",
            "tokens",
            "MB of keys and values",
            "this package",
            "torch",
            "times as fast",
            "into the cache",
            "by the cache itself",
        ],
        rows,
    )


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """It is never slower."""
    least = min(row["torch_s"] / row["ours_s"] for row in result["rows"])
    slowest = max(row["put_s"] / row["update_s"] for row in result["rows"])
    return [
        (f"at least as fast as torch everywhere: {least:.1f} times at worst", least >= 1),
        (f"a token is put in in at most twice the time that the cache itself takes: {slowest:.1f} times", slowest <= 2),
    ]


if __name__ == "__main__":
    typer.run(compare)
