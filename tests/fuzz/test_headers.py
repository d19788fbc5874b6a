"""The header of a safetensors file."""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import damaged, mutated
from transformers_moe_offload.tensor_files.index import read_header, read_metadata

_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    "b": {"dtype": "BF16", "shape": [16], "data_offsets": [128, 160]},
    "c": {"dtype": "U8", "shape": [0, 3], "data_offsets": [160, 160]},
    "d": {"dtype": "I64", "shape": [], "data_offsets": [160, 168]},
}
_DATA = bytes(168)
_TOKENS = (
    b"9" * 5000,
    b"-1",
    b"1e5",
    b"NaN",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b"null",
    b"true",
)


def file_of(header: bytes, data: bytes = _DATA) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def cases(rng: random.Random) -> Iterator[bytes]:
    while True:
        kind = rng.random()
        if kind < 0.5:
            text = json.dumps(mutated(rng, _HEADER, {"__metadata__": {}, "dtype": "F4", "shape": [2, 2]}))
            yield file_of(text.encode("utf-8", "surrogatepass"))
        elif kind < 0.8:
            yield file_of(damaged(rng, json.dumps(_HEADER).encode(), _TOKENS))
        else:
            yield damaged(rng, file_of(json.dumps(_HEADER).encode()), _TOKENS)


def run(case: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(case)
        tensors = read_header(path)
        read_metadata(path)
    for tensor in tensors:
        assert 8 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(case)


def test_only_errors_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=300)
