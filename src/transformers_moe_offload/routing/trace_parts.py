"""Read the parts of a recording, each checked against its index and against the parts before it."""

# V router calls, N tokens at one router, M tokens, K experts per token, E experts, H hidden

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.routing.trace_file import (
    INDEX,
    KIND,
    TOKEN_DTYPES,
    Part,
    RouterFacts,
    TraceIndex,
    file_of,
    refuse_folder,
)
from transformers_moe_offload.tensor_files.index import read_header
from transformers_moe_offload.tracing.trace_file import TraceError, reading_trace
from transformers_moe_offload.untrusted import quoted

_OF_ROUTER: dict[str, tuple[str, ...]] = {"experts": ("int16",), "weights": ("float32",)}
_IF_RECORDED: dict[str, tuple[str, ...]] = {"scores": ("float16", "float32"), "hidden": ("float32",)}


def read_parts(folder: Path, index: TraceIndex, files: Mapping[str, FileIdentity]) -> Iterator[Part]:
    """Read the parts one at a time, each checked against the index and those before it.

    `files` are the files' identities when the recording was loaded; a file that has changed since is refused.
    """
    num_steps = num_tokens = 0
    kinds: dict[str, str] = {}
    for name in index.parts:
        path = folder / name
        if name in files and file_of(folder, name) != files[name]:
            raise TraceError(f"{path} has changed since the trace was loaded; load the trace again")
        with reading_trace(path, KIND):
            _check_header(path, index)
            part: Part = load_file(path)
        _check(path, part, index, num_steps, num_tokens)
        _expect_alike(path, part, index, kinds)
        num_steps += num_steps_of(part)
        num_tokens += len(part["token_ids"])
        yield part
    if (num_steps, num_tokens) != (index.num_steps, index.num_tokens):
        refuse_folder(
            folder,
            f"its parts hold {num_steps:,} forwards of {num_tokens:,} tokens, but {INDEX} says {index.num_steps:,} "
            f"forwards of {index.num_tokens:,} tokens",
        )


def _expect_alike(path: Path, part: Part, index: TraceIndex, before: dict[str, str]) -> None:
    """Refuse a part whose scores or hidden states are missing or of another dtype or width than in earlier parts."""
    for router in range(len(index.routers)):
        for name in _IF_RECORDED if len(part[f"experts.{router}"]) else ():
            rows = part.get(f"{name}.{router}")
            found = "missing" if rows is None else f"{rows.dtype} of {rows.shape[1]} columns"
            if before.setdefault(f"{name}.{router}", found) != found:
                refuse_folder(
                    path,
                    f"{name} of router {router} are {found}, but {before[f'{name}.{router}']} in the parts before",
                )


def _check_header(path: Path, index: TraceIndex) -> None:
    """Refuse arrays that are missing, of another dtype or rank, before any is read."""
    try:
        found = {tensor.name: tensor for tensor in read_header(path)}
    except CheckpointError as error:
        raise TraceError(f"cannot read the {KIND} {path}: {error}") from error
    known: dict[str, tuple[tuple[str, ...], int]] = {
        "calls": (("int64",), 2),
        **{name: ((dtype,), 1) for name, dtype in TOKEN_DTYPES.items()},
    }
    for router in range(len(index.routers)):
        known |= {f"{name}.{router}": (dtypes, 2) for name, dtypes in (_OF_ROUTER | _IF_RECORDED).items()}
    for name, (dtypes, rank) in known.items():
        if name not in found and name.partition(".")[0] in _IF_RECORDED:
            continue
        dtype = found[name].dtype if name in found else "missing"
        if dtype not in dtypes:
            refuse_folder(path, f"its {name} is {dtype}, but must be {' or '.join(dtypes)}")
        if len(found[name].shape) != rank:
            refuse_folder(path, f"its {name} has shape {quoted(found[name].shape)}, but must have {rank} dimensions")


def num_steps_of(part: Part) -> int:
    """Number of forwards in a part; they are consecutive."""
    steps = part["calls"][:, 3]
    return int(steps[-1] - steps[0]) + 1 if len(steps) else 0


def _check(path: Path, part: Part, index: TraceIndex, first_step: int, tokens_before: int) -> None:
    """Refuse a part whose numbers contradict one another, the index, or the parts before it."""
    calls, num_tokens = part["calls"].astype(np.int64), len(part["token_ids"])
    if calls.shape[1] != 5:
        refuse_folder(path, f"its calls have {calls.shape[1]} columns, but must have 5")
    for name in TOKEN_DTYPES:
        if part[name].shape != (num_tokens,):
            refuse_folder(path, f"it has {num_tokens} token_ids, but {name} of shape {part[name].shape}")
    limits = {
        "token_ids": (-1, 2**31 - 1),
        "sequence": (0, tokens_before + num_tokens - 1),  # a text has a token at least
        "position": (-1, 2**31 - 1),
        "is_padding": (0, 1),
        "domain": (-1, len(index.domains) - 1),
    }
    for name, (least, most) in limits.items():
        _expect_between(path, f"its {name} has", part[name], least, most)
    strange = calls[(calls[:, 0] < 0) | (calls[:, 0] >= len(index.routers)), 0]
    if len(strange):
        refuse_folder(path, f"it has a call of router {strange.max()}, but {INDEX} lists {len(index.routers)} routers")
    steps = calls[:, 3]
    if len(steps) and (steps[0] != first_step or not np.isin(np.diff(steps), (0, 1)).all()):
        refuse_folder(
            path,
            f"its forwards are numbered {steps[0]} to {steps[-1]}, but must count up from {first_step} without gaps",
        )
    for router, facts in enumerate(index.routers):
        _check_router(path, part, calls[calls[:, 0] == router], router, facts)


def _check_router(path: Path, part: Part, own: NDArray[np.int64], router: int, facts: RouterFacts) -> None:
    """Refuse calls of one router, own (V, 5), that do not match its rows."""
    experts, num_tokens = part[f"experts.{router}"], len(part["token_ids"])
    first, num_rows, token = own[:, 1], own[:, 2], own[:, 4]
    _expect_between(path, f"router {router} has a call with a number of rows of", num_rows, 0, len(experts))
    _expect_between(path, f"router {router} has a call whose first token is", token, -1, num_tokens)
    for name in (*_OF_ROUTER, *_IF_RECORDED):
        rows = part.get(f"{name}.{router}")
        if rows is not None and len(rows) != num_rows.sum():
            refuse_folder(
                path,
                f"the calls of router {router} have {num_rows.sum()} rows in all, but it has {len(rows)} of {name}",
            )
    expected = np.cumsum(num_rows) - num_rows
    wrong = np.flatnonzero(first != expected)
    if len(wrong):
        begin, before = first[wrong[0]], expected[wrong[0]]
        refuse_folder(path, f"router {router} has a call from row {begin} on, but the calls before it end at {before}")
    end = np.where(token >= 0, token + num_rows, 0).max(initial=0)
    if end > num_tokens:
        refuse_folder(path, f"router {router} has a call up to token {end}, but the part has {num_tokens} tokens")
    if not 1 <= experts.shape[1] <= facts.num_experts or part[f"weights.{router}"].shape != experts.shape:
        refuse_folder(
            path,
            f"router {router} has choices of shape {experts.shape} and weights of shape "
            f"{part[f'weights.{router}'].shape}; both must have the same shape, with 1 to {facts.num_experts} columns",
        )
    scores = part.get(f"scores.{router}")
    if scores is not None and scores.shape[1] != facts.num_experts:
        refuse_folder(path, f"router {router} has {facts.num_experts} experts, but scores of {scores.shape[1]}")
    _expect_between(path, f"router {router} chose expert", experts, -1, facts.num_experts - 1)


def _expect_between(path: Path, what: str, found: NDArray[Any], least: int, most: int) -> None:
    """Refuse an array with an entry less than `least` or greater than `most`."""
    if found.size and not least <= found.min() <= found.max() <= most:
        wrong = found.min() if found.min() < least else found.max()
        refuse_folder(path, f"{what} {wrong}, but {least} to {most} are allowed")
