"""`config.json` with its `quantization_config`, and the index beside it, on their way through `from_pretrained`."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import damaged, hostile, mutated
from transformers_moe_offload import OffloadConfig

_INDEX = "model.safetensors.index.json"
_QUANTIZATIONS: list[Any] = [
    {"quant_method": "moe_offload", "version": 1, "experts": {"default": {"nbits": 4}}, "dense": None},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "mxfp4"},
    {"quant_method": "gptq", "bits": 4},
    [], {}, None, 0, "x", {"quant_method": None}, {"quant_method": []},
]  # fmt: skip
_FREE = (
    "quantization_config",
    "text_config",
    "transformers_weights",
    "model_type",
    "dtype",
    "architectures",
    "auto_map",
)
"""Entries whose values are replaced; what those of a model's own class may be is checked by that class."""
_TOKENS = (b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"\xff", b"NaN", b'"\\ud800"')


@cache
def _sound() -> dict[str, bytes]:
    """The files of a small checkpoint in several shards, by name."""
    config = MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, num_local_experts=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="4KB")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    config, index = json.loads(_sound()["config.json"]), json.loads(_sound()[_INDEX])
    while True:
        kind = rng.random()
        if kind < 0.4:
            quantization = rng.choice(_QUANTIZATIONS)
            if rng.random() < 0.5 and quantization:
                quantization = mutated(rng, quantization, {"layers": {"0-999999999": None}, "quant_method": "fp8"})
            yield "config.json", _written(config | {"quantization_config": quantization})
        elif kind < 0.6:
            yield "config.json", _written(config | {rng.choice(_FREE): hostile(rng)})
        elif kind < 0.7:
            yield "config.json", _written(hostile(rng))
        elif kind < 0.85:
            yield _INDEX, _written(mutated(rng, index, {"metadata": None, "weight_map": []}))
        else:
            yield _INDEX, damaged(rng, json.dumps(index).encode(), _TOKENS)


def _written(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def run(case: tuple[str, bytes]) -> None:
    name, content = case
    with tempfile.TemporaryDirectory() as folder:
        for file, sound in _sound().items():
            (Path(folder) / file).write_bytes(content if file == name else sound)
        AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig())


def test_only_errors_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=60)
