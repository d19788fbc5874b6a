"""Traces of caches and recordings of routers, damaged: each is refused, or tells figures that go together."""

import io
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.lib import format as npy

from fuzz.fuzzing import expect_no_faults
from fuzz.mutations import NUMBERS, damaged, mutated
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import RoutingTrace
from transformers_moe_offload.routing.order import reuse_order
from transformers_moe_offload.tracing import RecordedVisit, Trace, TraceError, replay, trace_file
from transformers_moe_offload.tracing.report import expert_use

Case = Mapping[str, bytes]
"""Files by name: `trace.npz`, or those of a recording."""

TOKENS = (
    b"PK\x01\x02",
    b"\x93NUMPY",
    b"'shape': (",
    b"'descr': '<U9'",
    b"99999999999",
    b"\xff" * 8,
    b"BF16",
    b"{",
    b"[",
)
HOSTILE_ARRAYS = [
    np.array([], np.int64), np.arange(3), np.zeros((2, 2), np.int64), np.zeros((0, 5), np.int64), np.array(7),
    np.full(4, -1), np.full(4, 2**62), np.array([2**31]), np.array(["a", "b"]), np.array([0.5, np.nan, np.inf, -1.0]),
    np.zeros((6, 0), np.int16), np.zeros((0, 9), np.float32), np.full((6, 2), 30000, np.int16),
]  # fmt: skip


def visits() -> Trace:
    trace = Trace(("layers.0", "layers.1"), (4, 8), (2, 3), stall_ms=[0.0, 1.5, 0.25, 0.0])
    for step, layer, wanted in [(0, 0, (3, 1)), (0, 1, (0, 7, 2)), (1, 0, (1, 2)), (1, 1, (5,))]:
        trace.visits.append(RecordedVisit(layer, wanted, step))
    trace.step_tokens = [3, 1]
    return trace


@cache
def arrays() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        visits().save(Path(folder) / "trace.npz")
        with np.load(Path(folder) / "trace.npz") as archive:
            return dict(archive)


def archive_of(rows: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **rows)
    return stream.getvalue()


INDEX = {
    "format": 1,
    "model": "M",
    "routers": [
        {
            "router": router, "path": f"layers.{router}.gate", "num_experts": 4, "num_with_weights": 4, "top_k": 2,
            "has_affinities": False, "layers": [router], "experts_paths": [f"layers.{router}.experts"],
        }
        for router in range(2)
    ],
    "domains": ["code", "law"],
    "parts": ["part-00000.safetensors", "part-00001.safetensors"],
    "num_steps": 4,
    "num_tokens": 8,
}  # fmt: skip


@cache
def parts() -> list[dict[str, np.ndarray]]:
    """Two parts of two forwards each: one of three tokens, and one of one."""
    rng = np.random.default_rng(0)
    made = []
    for part in range(2):
        calls = [(router, first, rows, 2 * part + step, first)
                 for step, (first, rows) in enumerate([(0, 3), (3, 1)]) for router in range(2)]  # fmt: skip
        one = {
            "calls": np.array(calls, np.int64),
            "token_ids": np.arange(4, dtype=np.int32),
            "sequence": np.full(4, part, np.int32),
            "position": np.arange(4, dtype=np.int32),
            "is_padding": np.zeros(4, np.uint8),
            "domain": np.full(4, part, np.int16),
        }
        for router in range(2):
            one[f"experts.{router}"] = np.argsort(rng.random((4, 4)))[:, :2].astype(np.int16)
            one[f"weights.{router}"] = np.full((4, 2), 0.5, np.float32)
            one[f"scores.{router}"] = rng.standard_normal((4, 4)).astype(np.float16)
        made.append(one)
    return made


def recording(index: object = INDEX, *changes: Mapping[str, np.ndarray | None]) -> dict[str, bytes]:
    """The files of a recording, with other arrays in its parts; those that are None are left out."""
    files = {"trace.json": json.dumps(index).encode()}
    for number, one in enumerate(parts()):
        changed = one | dict(changes[number] if number < len(changes) else {})
        kept = {
            name: np.ascontiguousarray(array)
            for name, array in changed.items()
            if array is not None and array.dtype.kind != "U"
        }
        files[f"part-{number:05}.safetensors"] = safetensors.numpy.save(kept)
    return files


def with_entries(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """The same array with one entry or its shape changed."""
    array = array.copy()
    kind = rng.random()
    if kind < 0.6 and array.size and array.dtype.kind in "iuf":
        number = rng.choice([*(n for n in NUMBERS if abs(n) < 2**63), rng.randrange(-3, 12)])
        with np.errstate(all="ignore"):
            array.flat[rng.randrange(array.size)] = np.array(number).astype(array.dtype)
        return array
    if kind < 0.8 and array.ndim:
        return np.repeat(array, rng.choice([0, 1, 2, 50]), axis=rng.randrange(array.ndim))
    if kind < 0.9 and array.ndim and len(array):
        return array[: rng.randrange(len(array))]
    other = rng.choice(HOSTILE_ARRAYS)
    if other.dtype.kind not in "iuf" or array.dtype.kind not in "iuf" or rng.random() < 0.3:
        return other
    with np.errstate(all="ignore"):
        return other.astype(array.dtype)


def changed(rng: random.Random, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Some arrays with one to three things changed in them."""
    rows = dict(rows)
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(sorted(rows))
        if rng.random() < 0.08:
            del rows[name]
        else:
            rows[name] = with_entries(rng, rows[name])
    return rows


def cases(rng: random.Random) -> Iterator[Case]:
    whole = archive_of(arrays())
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield {"trace.npz": damaged(rng, whole, TOKENS)}
        elif kind < 0.5:
            yield {"trace.npz": archive_of(changed(rng, arrays()))}
        elif kind < 0.65:
            yield recording(mutated(rng, INDEX))
        elif kind < 0.9:
            number = rng.randrange(2)
            one = {name: None for name in parts()[number]} | changed(rng, parts()[number])
            yield recording(INDEX, *([one] if number == 0 else [{}, one]))
        else:
            files = recording()
            name = rng.choice(sorted(files))
            yield files | {name: damaged(rng, files[name], TOKENS)}


def run(case: Case) -> object:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in case.items():
            (Path(folder) / name).write_bytes(content)
        return told_by_visits(Trace.load(Path(folder) / "trace.npz")) if "trace.npz" in case else told_by(Path(folder))


def told_by_visits(trace: Trace) -> list[object]:
    """What is made of a trace of a cache."""
    assert sum(map(sum, trace.counts().values())) == trace.num_asked
    replays = [replay(trace, policy, max(1, trace.total_experts // 4)) for policy in ("lru", "belady")]
    assert all(0 <= played.hits <= trace.num_asked for played in replays)
    assert replays[0].hits <= replays[1].hits
    return [str(trace), expert_use(trace).shape if trace.num_layers else None, [played.hits for played in replays]]


def told_by(folder: Path) -> list[object]:
    """What is made of a recording."""
    trace = RoutingTrace.load(folder)
    with np.errstate(all="ignore"):
        told: list[object] = [str(trace), trace.summary(), trace.agreement(trace), reuse_order(trace)]
        for router in range(len(trace.routers)):
            statistics = trace.statistics(router)
            assert statistics.load.sum() == np.trace(statistics.co_activation)
            told += [trace.preferences(router)] if trace.domains else []
    told.append(trace.to_arrow().num_rows)
    told += told_by_visits(trace.to_cache_trace())
    return told


def test_damaged_traces_are_refused_with_an_error_of_ours():
    expect_no_faults(sys.modules[__name__], num_cases=300)


def test_what_is_damaged_here_is_sound_before(tmp_path):
    assert told_by_visits(visits())
    for name, content in recording().items():
        (tmp_path / name).write_bytes(content)
    assert told_by(tmp_path)


def header(text: bytes) -> bytes:
    """A member of an archive whose array has this header."""
    text = text.ljust(118) + b"\n"
    return npy.magic(1, 0) + len(text).to_bytes(2, "little") + text


def archive_with(member: bytes, name: str = "wanted.npy") -> bytes:
    """A trace with these bytes in place of one of its arrays."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive_of(arrays()))) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, member if info.filename == name else old.read(info))
    return stream.getvalue()


def patched(content: bytes, offset: int, value: bytes) -> bytes:
    """An archive with bytes changed in the first entry of its directory."""
    at = content.index(b"PK\x01\x02") + offset
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: archive_of(arrays() | {"num_experts": np.array([4, 2**31])}), "more than any model"),
        (lambda: archive_of(arrays() | {"layer_names": np.array(["a", "a"])}), "two of its layers have one name"),
        (lambda: archive_of(arrays() | {"step_tokens": np.array([3, -1])}), "its step_tokens has -1"),
        (lambda: patched(archive_of(arrays()), 8, b"\1\0"), "is encrypted"),
        (lambda: patched(archive_of(arrays()), 10, b"\x63\0"), "compressed in another way"),
        (lambda: archive_with(b"no array"), "cannot read the trace"),
        (lambda: archive_with(header(b"{")), "cannot read the trace"),
        (lambda: archive_with(header(b"(" * 117)), "cannot read the trace"),
        (lambda: archive_with(header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (10**20,)}")), "cannot read"),
        (
            lambda: archive_with(header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (2000000000,)}")),
            "declares 2000000000 entries",
        ),
        (
            lambda: archive_with(header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"9" * 20 + b",)}")),
            "declares 99999999999999999999 entries",
        ),
        (
            lambda: archive_with(header(b"{'descr': '<U0', 'fortran_order': False, 'shape': (9,)}"), "layer_names.npy"),
            "declares 9 entries",
        ),
        (lambda: archive_of(arrays() | {"wanted": np.zeros(10**8, np.int8)}), "a recording in a file of its size"),
    ],
)
def test_a_trace_that_would_take_much_or_break_a_library_is_refused(tmp_path, content, message):
    (tmp_path / "trace.npz").write_bytes(content())
    with pytest.raises(TraceError, match=message) as refused:
        Trace.load(tmp_path / "trace.npz")
    assert len(str(refused.value)) < 500


def calls(column: int, *values: int) -> dict[str, np.ndarray]:
    """The calls of a part with other numbers in a column, the first ones first."""
    array = parts()[0]["calls"].copy()
    array[: len(values), column] = values
    return {"calls": array}


def entries(name: str, value: int) -> dict[str, np.ndarray]:
    """One array of the first part, full of a number."""
    return {name: np.full_like(parts()[0][name], value)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (calls(3, -1), "must count up from 0 without gaps"),
        (calls(3, 0, 0, 10**6, 10**6), "numbered 0 to 1000000, but must count up from 0"),
        (calls(0, -1), "a call of router -1"),
        (calls(0, 7), "a call of router 7, but trace.json lists 2 routers"),
        (calls(2, -3), "a number of rows of -3"),
        (calls(2, 2, 2, 2, 2), "a call from row 3 on, but the calls before it end at 2"),
        (calls(1, 1), "a call from row 1 on, but the calls before it end at 0"),
        (calls(4, 2), "but the part has 4 tokens"),
        (calls(4, -2), "a call whose first token is -2"),
        (entries("sequence", 2**31 - 1), "its sequence has 2147483647"),
        (entries("token_ids", -5), "its token_ids has -5"),
        (entries("domain", 2), "its domain has 2"),
        (entries("is_padding", 3), "its is_padding has 3"),
        (entries("experts.1", -2), "router 1 chose expert -2"),
        (entries("experts.1", 4), "router 1 chose expert 4"),
        ({"experts.0": np.zeros((4, 0), np.int16)}, "router 0 has choices of shape"),
        ({"experts.0": np.zeros(4, np.int16)}, "must have 2 dimensions"),
        ({"calls": np.zeros(20, np.int64)}, "must have 2 dimensions"),
        ({"token_ids": np.zeros((4, 1), np.int32)}, "must have 1 dimensions"),
        ({"weights.0": np.zeros((4, 3), np.float32)}, "weights of shape"),
        ({"scores.0": np.zeros((4, 9), np.float16)}, "router 0 has 4 experts, but scores of 9"),
        ({"scores.0": np.zeros((3, 4), np.float16)}, "but it has 3 of scores"),
        ({"scores.0": None}, "scores of router 0 are float16 of 4 columns, but missing in the parts before"),
        (
            {"scores.0": np.zeros((4, 4), np.float32)},
            "are float16 of 4 columns, but float32 of 4 columns in the parts before",
        ),
        ({"position": np.arange(4)}, "its position is int64, but must be int32"),
        ({"weights.1": np.zeros((4, 2), np.float16)}, r"its weights\.1 is float16, but must be float32"),
    ],
)
def test_a_part_whose_numbers_do_not_belong_to_it_is_refused(tmp_path, change, message):
    for name, content in recording(INDEX, change).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=message):
        RoutingTrace.load(tmp_path).summary()
    with pytest.raises(TraceError, match=message):
        RoutingTrace.load(tmp_path).to_cache_trace()


def first_router(**changes: object) -> dict[str, object]:
    """What `trace.json` says, with something else about its first router."""
    return {"routers": [INDEX["routers"][0] | changes, *INDEX["routers"][1:]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps=-1"),
        ({"num_steps": 10**9}, "its parts hold 4 forwards of 8 tokens, but trace.json says 1,000,000,000"),
        ({"num_tokens": 9}, "its parts hold 4 forwards of 8 tokens"),
        ({"num_steps": True}, "num_steps=True"),
        ({"model": 3}, "model=3"),
        ({"domains": ["\ud800", "a"]}, "domains="),
        ({"domains": ["a"] * 4}, "or one twice"),
        ({"parts": ["part-00000.safetensors"] * 2}, "names a part twice"),
        ({"parts": ["\0"]}, "is not the name of a part"),
        ({"more": 1}, "has the keys"),
        (first_router(num_experts=2**31), "more than any model"),
        (first_router(num_experts=2), "router 0 has 2 experts, 4 of them with weights"),
        (first_router(router=1), r"its routers are numbered \[1, 1\]"),
        (first_router(router=2**31), "its routers are numbered"),
        (first_router(top_k="2"), "top_k='2'"),
        (first_router(layers=[0, 1]), "router 0 is followed by 2 layers at 1 paths"),
        (first_router(layers=[1]), "two routers have one layer"),
        (first_router(layers="01"), "layers='01'"),
    ],
)
def test_an_index_whose_entries_cannot_be_is_refused(tmp_path, change, message):
    for name, content in recording(INDEX | change).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=message):
        RoutingTrace.load(tmp_path).to_cache_trace()


def test_a_recording_without_routers_has_no_texts_to_order(tmp_path):
    empty = {"routers": [], "domains": [], "parts": [], "num_steps": 0, "num_tokens": 0}
    for name, content in recording(INDEX | empty).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="holds no text"):
        reuse_order(RoutingTrace.load(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"\xff", b"", b"null"],
    ids=["nested", "a huge number", "no text", "empty", "null"],
)
def test_an_index_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(TraceError) as refused:
        RoutingTrace.load(tmp_path)
    assert len(str(refused.value)) < 500


def test_a_part_in_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    import torch
    from safetensors.torch import save

    files = recording()
    tensors = {name: torch.from_numpy(array) for name, array in parts()[0].items()}
    files["part-00000.safetensors"] = save(tensors | {"weights.0": tensors["weights.0"].bfloat16()})
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=r"its weights\.0 is bfloat16"):
        RoutingTrace.load(tmp_path).summary()


def test_a_recording_of_more_experts_than_a_table_of_pairs_can_have_is_refused(tmp_path):
    """What was chosen can be few rows, whatever an index says of the router."""
    without = {f"scores.{router}": None for router in range(2)}
    for name, content in recording(INDEX | first_router(num_experts=30000), without, without).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=r"pairs of experts need a table of 30,000 by 30,000 entries"):
        RoutingTrace.load(tmp_path).summary()


def test_a_long_recording_that_shrinks_to_nothing_can_be_read_again(tmp_path, monkeypatch):
    """It is longer than the arrays of a small file may be, and compresses better than a recording usually does."""
    monkeypatch.setattr(trace_file, "_MAX_SMALL_BYTES", 2**18)
    everything = tuple(range(1024))
    trace = Trace(("layers.0",), (1024,), visits=[RecordedVisit(0, everything, step) for step in range(200)])
    trace.step_tokens = [1] * 200
    trace.save(tmp_path / "trace.npz")
    assert (tmp_path / "trace.npz").stat().st_size > 200 * 1024 * 4, "written without compression"
    assert Trace.load(tmp_path / "trace.npz") == trace
