"""`*.safetensors.index.json`, as every reader of it has it."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import damaged, mutated
from transformers_moe_offload import CheckpointError
from transformers_moe_offload.tensor_files.index import WeightMap, check_index_file

_INDEX = {
    "metadata": {"total_size": 1024, "total_parameters": 256},
    "weight_map": {f"model.layers.{n}.weight": f"model-0000{n}-of-00003.safetensors" for n in range(1, 4)},
}
_TOKENS = (
    b"9" * 5000,
    b"null",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xff",
    b'"\\ud800"',
    b"../",
    b"\\u0000",
    b"NaN",
    b"1e999",
)


def cases(rng: random.Random) -> Iterator[bytes]:
    text = json.dumps(_INDEX)
    while True:
        if rng.random() < 0.6:
            changed = mutated(rng, _INDEX, {"weight_map": {}, "metadata": {}, "total_size": 5})
            yield json.dumps(changed).encode("utf-8", "surrogatepass")
        else:
            yield damaged(rng, text.encode(), _TOKENS)


def run(case: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors.index.json"
        path.write_bytes(case)
        found = WeightMap.read(path, needs_metadata=True)
        for file in found.files.values():
            assert Path(folder) in (Path(folder) / file).resolve().parents
        with suppress(CheckpointError):  # there are no files
            check_index_file(path, {})


def test_only_errors_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=300)
