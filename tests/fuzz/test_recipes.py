"""Recipes for mixtures: ours and mergekit-moe's, as YAML."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import damaged, mutated
from transformers_moe_offload.builder import MoeRecipe
from transformers_moe_offload.builder.plan.mixture import expect_possible, mixture_of

_OURS: list[dict[str, Any]] = [
    {
        "schema": 1, "base_model": "me/base", "experts_per_token": 2, "container": "mixtral", "dtype": "float32",
        "experts": [
            {"source": "me/one@v2+me/lora", "name": "one", "positive_prompts": ["a", "b"], "noise_scale": 0.1},
            {"source": {"model": "me/two", "extract_rank": 4}, "dataset": {"path": "x.txt", "max_tokens": 100}},
        ],
        "shared_experts": [{"source": "me/base", "gated": True, "residual_scale": 0.5}],
        "layers": [0, 1], "gate": {"mode": "mean", "scale": 2.0, "seed": 3, "target_entropy": 0.5},
        "stem": {"method": "ties", "density": 0.5}, "checks": {"similarity": "warn", "licence": "off"},
        "output": {"max_shard_size": "1GB"}, "hub": {"repo_id": "me/x", "tags": ["a"]}, "seed": 1,
    },
    {"schema": 1, "base_model": "b", "kind": "upcycle", "upcycle": {"num_experts": 4, "granularity": 2, "seed": 1}},
    {"schema": 1, "base_model": "b", "kind": "split", "split": {"num_experts": 8, "shared": 1, "method": "random"}},
    {
        "schema": 1, "base_model": "b", "kind": "adapter_moe", "experts": [{"source": {"adapter": "x"}}] * 2,
        "adapter_moe": {"router_per": "linear", "scoring": "softmax", "temperature": 0.5},
    },
]  # fmt: skip
_MERGEKIT = {
    "base_model": "me/base", "gate_mode": "hidden", "dtype": "bfloat16", "experts_per_token": 2,
    "experts": [{"source_model": "me/one", "positive_prompts": ["a"]}, {"source_model": "me/two", "noise_scale": 0.1}],
    "shared_experts": [{"source_model": "me/one", "positive_prompts": ["b"]}], "architecture": "qwen",
}  # fmt: skip
_KEYS = {
    "schema": 1,
    "kind": "split",
    "split": {"num_experts": 2**31},
    "upcycle": {"granularity": 10**12},
    "layers": [9],
}
_BOMB = b"x0: &0 [a,a,a,a,a,a,a,a,a]\n" + b"".join(
    b"x%d: &%d [%s]\n" % (n, n, b",".join([b"*%d" % (n - 1)] * 9)) for n in range(1, 9)
)
_TOKENS = (
    b"*8", b"&a", b"*a", b"? [a]\n: b", b"!!set {a}", b"!!int x", b"!!bool x", b"!python/object:os.system x", b"<<: 1",
    b"2001-99-99", b'"\\U00110000"', b"[" * 2000, b"- " * 500, b"9" * 5000, b"0x" + b"f" * 5000, b".inf", b".nan", b"~",
    b"1:99:99", b"!!omap [a: b]", b"!!binary x", b"---\n", b"\t", b"%TAG ! x", b"\xff", b"'", b"|\n", b">-\n", b"=",
)  # fmt: skip


def cases(rng: random.Random) -> Iterator[bytes]:
    while True:
        recipe = rng.choice([*_OURS, _MERGEKIT])
        kind = rng.random()
        if kind < 0.55:
            # JSON is YAML, and is written at any depth.
            yield json.dumps(mutated(rng, recipe, _KEYS)).encode("utf-8", "replace")
        else:
            plain = yaml.safe_dump(recipe, default_flow_style=rng.choice([None, False, True])).encode()
            yield (_BOMB if kind > 0.9 else b"") + damaged(rng, plain, _TOKENS)


def run(case: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(case)
        recipe = MoeRecipe.from_file(path)
        assert MoeRecipe.from_dict(recipe.to_dict()) == recipe
        expect_possible(recipe, 4096)
        mixture_of(recipe)


def test_only_errors_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=300)
