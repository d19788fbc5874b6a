"""The file of a trace or a recording: an `.npz` archive of a few rows of numbers, and one of names.

A file is untrusted, so sizes are checked before anything is read from it: the bytes of arrays against the size of the
file, their shapes against the bytes that are there, and numbers that tables are allocated by against `MAX_TABLE`.
Errors of zipfile, NumPy and safetensors at damaged files become a `TraceError`.
"""

# V visits, S steps, L sparse layers, W experts wanted over all visits

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.tensor_files.writer import new_file
from transformers_moe_offload.untrusted import one_line, quoted

FORMAT = 1
"""Version of the file; a reader refuses those it does not know."""

MAX_TABLE = 2**22
"""Most entries of a table with a row for each layer or router and a column for each expert, as they are drawn and
counted: 32 MiB. The largest models of 2026 have 61 layers of 384 experts, which are 23,424."""
_MAX_ROWS = 2**12
"""Most layers or routers."""

_MAX_SMALL_BYTES = 32 * 2**20
"""Bytes that arrays may take in any file, however small: about 600,000 visits."""
_MAX_RATIO = 64
"""Bytes that they may take for each byte of a larger file. A recording shrinks to a tenth, and to a 39th if every visit
wants the same experts; an archive can be made to hold a thousand times its size."""

_ZIP, _NUMPY = b"PK", b"\x93NUMPY"
"""How archives of arrays, and single arrays, begin."""
_ENCRYPTED = 1
"""Bit of a member's flags."""

REQUIRED = {
    "format": "i",
    "layer_names": "U",
    "num_experts": "i",
    "layer": "i",
    "step": "i",
    "starts": "i",
    "wanted": "i",
    "step_tokens": "i",
}
"""Arrays of the file and the kinds of their elements, as numpy abbreviates them."""

OPTIONAL = {"experts_per_token": "i", "stall_ms": "f"}

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Source = str | os.PathLike[str]


class TraceError(MoeOffloadError):
    """A trace that cannot be read, written or drawn, with the reason."""


@contextmanager
def reading_trace(path: Source, kind: str = "trace") -> Iterator[None]:
    """Turn errors of libraries at a damaged file into a `TraceError`. Only around calls of such libraries."""
    try:
        yield
    except MoeOffloadError:
        raise
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise TraceError(
            f"cannot read the {kind} {path}: it is damaged, or was cut short ({one_line(error)}); record it again"
        ) from error
    except OSError as error:
        raise TraceError(f"cannot read the {kind} {path}: {_why(path, error)}") from error
    except Exception as error:  # SyntaxError, RecursionError, MemoryError, ...: no list covers all errors of damage
        raise TraceError(
            f"cannot read the {kind} {path}: it is damaged ({type(error).__name__}: {one_line(error)})"
        ) from error


def _why(path: Source, error: OSError) -> str:
    """Why the system does not read a trace; for a folder without one, what the folder may be instead."""
    if isinstance(error, FileNotFoundError) and os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "config.json")):
            return "it is the folder of a model; record a trace of it with `moe-offload trace`"
        missing = os.path.basename(one_line(error.filename))
        return f"it has no {missing}; name the folder of a recording of the routing, or an .npz file"
    return error.strerror or one_line(error)


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write the file; it is there complete or not at all."""
    expect_table(path, arrays["num_experts"].tolist(), "layers")
    members: dict[str, Any] = dict(arrays)
    with whole_file(path, "the trace") as unfinished:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **members)
        if sum(array.nbytes for array in arrays.values()) > 0.9 * _most_bytes(unfinished.stat().st_size):
            with unfinished.open("wb") as file:  # a reader would refuse the compressed file as a zip bomb
                np.savez(file, **members)


@contextmanager
def whole_file(path: Path, kind: str) -> Iterator[Path]:
    """An empty file beside a path, to be written: it takes its place when the block ends, and is gone if that fails."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            new_file(unfinished).close()
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot write {kind} {path}: {getattr(error, 'strerror', None) or error}") from error


def read_arrays(path: Source) -> dict[str, Array]:
    """The arrays of a file, each (N,), checked against one another; `TraceError` if it is not a trace, or damaged."""
    with reading_trace(path), open(path, "rb") as file:
        _expect_archive(path, file.read(len(_NUMPY)))
        most_bytes = _most_bytes(os.fstat(file.fileno()).st_size)
        with zipfile.ZipFile(file) as archive:
            members = _members(path, archive, most_bytes)
            arrays = {name: _array(path, name, archive.read(member)) for name, member in members.items()}
    _check(path, arrays)
    return arrays


def expect_table(path: Source, num_experts: list[int], rows: str) -> None:
    """Refuse numbers of experts by layer or router that are below 1, or too large for a table."""
    for row, count in enumerate(num_experts):
        if count < 1:
            refuse(path, f"{rows[:-1]} {row} has {count} experts")
    most = max(num_experts, default=0)
    if len(num_experts) > _MAX_ROWS or len(num_experts) * most > MAX_TABLE:
        refuse(path, f"it has {len(num_experts):,} {rows} of up to {most:,} experts, more than any model")


def refuse(path: Source, reason: str, kind: str = "trace") -> NoReturn:
    """Raise the error of a file whose content contradicts itself."""
    raise TraceError(f"{path} is not a {kind}: {reason}")


def _most_bytes(file_bytes: int) -> int:
    return max(_MAX_SMALL_BYTES, _MAX_RATIO * file_bytes)


def _expect_archive(path: Source, start: bytes) -> None:
    if start.startswith(_NUMPY):
        refuse(path, "it holds one array and not an archive of them")
    if not start.startswith(_ZIP):
        raise TraceError(
            f"cannot read the trace {path}: it is not an .npz archive; record one with `moe-offload trace`"
        )


def _members(path: Source, archive: zipfile.ZipFile, most_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by the names of their arrays; none has been opened."""
    members: dict[str, zipfile.ZipInfo] = {}
    missing = sorted(REQUIRED.keys() - {name.removesuffix(".npy") for name in archive.namelist()})
    if missing:
        refuse(path, f"it has no {', '.join(missing)}; record one with `moe-offload trace`")
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name not in REQUIRED | OPTIONAL:
            refuse(path, f"it has {quoted(name)}, which is not part of a trace")
        if name in members:
            refuse(path, f"it has {name} twice")
        if member.flag_bits & _ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            refuse(path, f"its {name} is encrypted, or compressed in another way than traces are")
        members[name] = member
    nbytes = sum(member.file_size for member in members.values())
    if nbytes > most_bytes:
        refuse(
            path, f"it holds {nbytes:,} bytes of arrays, and a recording in a file of its size at most {most_bytes:,}"
        )
    return members


def _array(path: Source, name: str, content: bytes) -> Array:
    """The array in a member, without a copy. Its header must agree with the bytes that follow it."""
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        refuse(path, f"its {name} is an array of version {version}, which traces do not use")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    kind = (REQUIRED | OPTIONAL)[name]
    if len(shape) != 1 or dtype.kind != kind:
        refuse(path, f"its {name} is {one_line(dtype, 40)} of shape {quoted(shape)}, not one row of {kind!r}")
    data_bytes = len(content) - stream.tell()
    if dtype.itemsize < 1 or shape[0] < 0 or prod(shape) * dtype.itemsize != data_bytes:
        refuse(path, f"its {name} declares {quoted(shape[0])} entries, but has {data_bytes:,} bytes")
    return np.frombuffer(content, dtype, shape[0], stream.tell())


def _check(path: Source, arrays: Arrays) -> None:
    """Refuse arrays whose lengths or entries do not fit together."""
    if arrays["format"].tolist() != [FORMAT]:
        refuse(
            path,
            f"its format is {quoted(arrays['format'].tolist())}, and this version reads {[FORMAT]}; record it again",
        )
    _check_lengths(path, {name: len(array) for name, array in arrays.items()})
    names = arrays["layer_names"].tolist()
    if len(set(names)) < len(names):
        refuse(path, "two of its layers have one name")
    expect_table(path, arrays["num_experts"].tolist(), "layers")
    for name in ("step_tokens", "experts_per_token"):
        if name in arrays and arrays[name].min(initial=0) < 0:
            refuse(path, f"its {name} has {arrays[name].min()}, which is negative")
    if "stall_ms" in arrays and not (np.isfinite(arrays["stall_ms"]) & (arrays["stall_ms"] >= 0)).all():
        refuse(path, "its stall_ms has negative or infinite entries")
    starts = arrays["starts"]
    if starts[0] != 0 or starts[-1] != len(arrays["wanted"]) or (starts[1:] < starts[:-1]).any():
        refuse(path, f"its starts do not divide the {len(arrays['wanted'])} experts wanted into visits")
    _check_visits(path, arrays)


def _check_lengths(path: Source, lengths: Mapping[str, int]) -> None:
    layers, visits = lengths["layer_names"], lengths["layer"]
    expected = {"num_experts": layers, "experts_per_token": layers, "step": visits, "stall_ms": visits}
    for name, length in (expected | {"starts": visits + 1}).items():
        if lengths.get(name, length) != length:
            refuse(path, f"it has {layers} layers and {visits} visits, but {lengths[name]} entries of {name}")


def _check_visits(path: Source, arrays: Arrays) -> None:
    """Refuse visits of layers, experts or steps that do not exist, and steps that go backwards."""
    layer, step, num_experts = arrays["layer"], arrays["step"].astype(np.int64), arrays["num_experts"].astype(np.int64)
    num_layers, num_steps = len(num_experts), len(arrays["step_tokens"])
    if len(layer) == 0:
        return
    strange = (layer < 0) | (layer >= num_layers)
    if strange.any():
        refuse(path, f"a visit is of layer {layer[strange][0]}, and there are {num_layers} layers")
    before = np.r_[0, step[:-1]]
    if (step < before).any():
        place = int(np.argmax(step < before))
        refuse(path, f"step {step[place]} comes after step {before[place]}")
    if step[-1] >= num_steps:
        refuse(path, f"a visit is of step {step[-1]}, and there are {num_steps} steps")
    starts, wanted = arrays["starts"].astype(np.int64), arrays["wanted"].astype(np.int64)  # (V + 1,), (W,)
    visit = np.repeat(np.arange(len(layer)), np.diff(starts))  # (W,)
    strange = (wanted < 0) | (wanted >= num_experts[layer[visit]])
    if strange.any():
        one = int(visit[strange][0])
        own = wanted[starts[one] : starts[one + 1]]
        refuse(
            path,
            f"a visit of layer {layer[one]} wants experts {own.min()} to {own.max()}, "
            f"and the layer has {num_experts[layer[one]]}",
        )
    by_visit = np.sort(visit * MAX_TABLE + wanted)  # experts are fewer than that
    twice = by_visit[1:][by_visit[1:] == by_visit[:-1]]
    if len(twice):
        one = int(twice[0] // MAX_TABLE)
        experts = tuple(wanted[starts[one] : starts[one + 1]].tolist())
        refuse(path, f"a visit of layer {layer[one]} wants an expert twice: {quoted(experts)}")
