"""Routes of texts as arrays `routed_experts` (tokens, layers, K), from and to other programs.

The form in which inference engines hand the routes of a rollout to trainers, for rollout routing replay (R3, arXiv
2510.11370): `CompletionOutput.routed_experts` of vLLM (int16), `meta_info["routed_experts"]` of SGLang (int32), and the
field of that name in NeMo-RL, verl, prime-rl and tunix. In all of them
- a text of N tokens has N - 1 rows, because the token that was sampled last was not read, or N rows;
- the axis of layers has the sparse layers only, or all layers of the decoder, of which the dense ones are not looked at
  (vLLM has had both; verl #5037);
- a row of -1 in all entries says that the route of a token is not known, and the trainer's router chooses
  (NeMo-RL, tunix).
"""

# N tokens of a text, L layers, K experts per token

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.recorded_texts import RecordedTexts
from transformers_moe_offload.routing.trace_data import RecordedRouting
from transformers_moe_offload.routing.trace_file import TOKEN_DTYPES, Part, RouterFacts, TraceIndex
from transformers_moe_offload.tracing.trace_file import TraceError, whole_file

_ARRAYS = {"token_ids": 1, "routed_experts": 3, "num_tokens": 1}
"""The arrays of a file, and their dimensions: all texts one after the other, and the number of tokens of each."""


def exported(trace: RecordedRouting, recorded: RecordedTexts, text: int, num_layers: int | None) -> NDArray[np.int16]:
    """The routes of one text: (N, L, K), -1 where there is none, as in the dense layers that `num_layers` adds."""
    is_here = recorded.text == text
    if not is_here.any():
        raise TraceError(
            f"text {text} is not in the trace from its beginning; it has texts "
            f"{_some(np.unique(recorded.text).tolist())}"
        )
    layers = trace.sparse_layers()
    number = {facts.router: place for place, facts in enumerate(trace.routers)}
    rows = [recorded.experts[number[facts.router]][is_here] for _, _, facts in layers]
    width = max(row.shape[1] for row in rows)
    found = np.stack([np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=-1) for row in rows], axis=1)
    if num_layers is None:
        return found
    places = _places_in_decoder([path for _, path, _ in layers])
    if places is None or max(places) >= num_layers:
        raise ConfigError(
            f"num_layers={num_layers}, but the sparse layers of the trace are at {layers[0][1]} to {layers[-1][1]}; "
            f"leave it out for sparse layers only"
        )
    wide = np.full((len(found), num_layers, width), -1, np.int16)
    wide[:, places] = found
    return wide


def imported(
    model: str,
    routers: Sequence[RouterFacts],
    token_ids: Sequence[ArrayLike],
    routed_experts: Sequence[ArrayLike],
    num_layers: int | None,
) -> tuple[TraceIndex, Part]:
    """A recording of texts, each with the routes of its tokens. `num_layers`: of the decoder, dense ones included."""
    if len(token_ids) != len(routed_experts) or not len(token_ids):
        raise ConfigError(
            f"token_ids has {len(token_ids)} texts, and routed_experts has {len(routed_experts)}; pass both for every "
            "text"
        )
    index = TraceIndex(model, list(routers))
    ids = [_token_ids(one, number) for number, one in enumerate(token_ids)]
    routes = [
        _of_sparse_layers(_array(one, number, len(ids[number])), routers, num_layers, number)
        for number, one in enumerate(routed_experts)
    ]
    width = max(one.shape[2] for one in routes)
    lengths = np.array([len(one) for one in ids])
    firsts = lengths.cumsum() - lengths
    rows = np.array([len(one) for one in routes])
    first_rows = rows.cumsum() - rows
    calls = [
        (router, first_rows[text], rows[text], text, firsts[text])
        for text in range(len(ids))
        for router in range(len(routers))
    ]
    of_tokens: dict[str, NDArray[Any]] = {
        "token_ids": np.concatenate(ids),
        "sequence": np.repeat(np.arange(len(ids)), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "is_padding": np.zeros(lengths.sum()),
        "domain": np.full(lengths.sum(), -1),
    }
    part: Part = {"calls": np.array(calls, np.int64)}
    part |= {name: of_tokens[name].astype(dtype) for name, dtype in TOKEN_DTYPES.items()}
    together = np.concatenate(
        [np.pad(one, ((0, 0), (0, 0), (0, width - one.shape[2])), constant_values=-1) for one in routes]
    )
    layers = sorted((layer, router) for router, facts in enumerate(routers) for layer in facts.layers)
    for router in range(len(routers)):
        own = together[:, [place for place, (_, number) in enumerate(layers) if number == router]]
        if (own != own[:, :1]).any():
            raise ConfigError(
                f"router {routers[router].router} decides for {own.shape[1]} layers, but they have different routes; "
                f"these are of another model"
            )
        _check_experts(own[:, 0], routers[router])
        part[f"experts.{router}"] = np.ascontiguousarray(own[:, 0], np.int16)
        unknown = np.where(own[:, 0] >= 0, np.nan, 0) + np.where((own[:, 0] < 0).all(1), np.nan, 0)[:, None]
        part[f"weights.{router}"] = unknown.astype(np.float32)
    index.num_steps, index.num_tokens = len(ids), int(lengths.sum())
    return index, part


def write_file(path: str | os.PathLike[str], texts: Sequence[tuple[NDArray[Any], NDArray[np.int16]]]) -> None:
    """Write texts, their tokens (N,) and routes (N, L, K), into an .npz file, without pickle."""
    if Path(path).suffix != ".npz":
        raise ConfigError(f"{path} is not the name of an .npz file; let it end in .npz")
    if not texts:
        raise TraceError("the trace has 0 texts that were recorded from their beginning; there is nothing to write")
    with whole_file(Path(path), "the file") as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            token_ids=np.concatenate([ids for ids, _ in texts]).astype(np.int32),
            routed_experts=np.concatenate([routes for _, routes in texts]),
            num_tokens=np.array([len(ids) for ids, _ in texts], np.int64),
        )


def read_file(path: str | os.PathLike[str]) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Tokens and routes of the texts in a file of `write_file`; raises `TraceError` for any other file."""
    try:
        with zipfile.ZipFile(path) as file:
            members = {name: f"{name}.npy" for name in _ARRAYS if f"{name}.npy" in file.namelist()}
            found = {}
            for name, member in members.items():
                with file.open(member) as stream:
                    found[name] = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        raise TraceError(f"cannot read routes from {path}: {error}") from error
    missing = [name for name in _ARRAYS if name not in found]
    if missing:
        raise TraceError(f"{path} has no array {missing[0]}; write it with RoutingTrace.save_routed_experts")
    for name, dimensions in _ARRAYS.items():
        if found[name].ndim != dimensions or not np.issubdtype(found[name].dtype, np.integer):
            raise TraceError(
                f"{path}: {name} is {found[name].dtype} of {found[name].ndim} dimensions, but must be integers of "
                f"{dimensions}"
            )
    ids, routes, lengths = (found[name] for name in _ARRAYS)
    if len(lengths) and lengths.min() < 1:
        raise TraceError(f"{path}: a text has {lengths.min()} tokens, but must have 1 or more")
    if not len(ids) == len(routes) == lengths.sum():
        raise TraceError(f"{path} has {len(ids)} tokens and {len(routes)} routes, but texts of {lengths.sum()} tokens")
    ends = lengths.cumsum()[:-1]
    return np.split(ids, ends), np.split(routes, ends)


def _token_ids(given: ArrayLike, text: int) -> NDArray[np.int64]:
    ids = np.asarray(given)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(
            f"token_ids of text {text} are {ids.dtype} of shape {ids.shape}; pass a list of one or more token ids, "
            f"without padding"
        )
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ConfigError(
            f"token_ids of text {text} range from {ids.min()} to {ids.max()}, and 0 to 2**31 - 1 are allowed"
        )
    return ids.astype(np.int64)


def _array(given: ArrayLike, text: int, num_tokens: int) -> NDArray[Any]:
    """The routes of a text of so many tokens."""
    routes = np.asarray(given)
    if routes.ndim != 3 or not np.issubdtype(routes.dtype, np.integer):
        raise ConfigError(
            f"routed_experts of text {text} is {routes.dtype} of shape {routes.shape}; pass integers (tokens, layers, "
            "top_k)"
        )
    if len(routes) not in (num_tokens, num_tokens - 1):
        raise ConfigError(
            f"routed_experts of text {text} has {len(routes)} rows for {num_tokens} tokens; pass a row for each token, "
            f"or for each but the last"
        )
    return routes


def _of_sparse_layers(
    routes: NDArray[Any], routers: Sequence[RouterFacts], num_layers: int | None, text: int
) -> NDArray[Any]:
    """The rows of sparse layers, of arrays (N, L, K) that may have dense ones as well."""
    paths = [path for _, path in sorted((layer, path) for one in routers for layer, path in _layers(one))]
    if routes.shape[1] == len(paths):
        return routes
    places = _places_in_decoder(paths)
    if places is not None and routes.shape[1] == num_layers:
        return routes[:, places]
    raise ConfigError(
        f"routed_experts of text {text} has {routes.shape[1]} layers, but the model has {len(paths)} sparse ones"
        + (f" of {num_layers}" if num_layers is not None else "")
        + "; these are routes of another model"
    )


def _layers(facts: RouterFacts) -> list[tuple[int, str]]:
    return list(zip(facts.layers, facts.experts_paths, strict=True))


def _places_in_decoder(paths: Sequence[str]) -> list[int] | None:
    """The number of the decoder layer that each experts module is in; None where paths do not say."""
    found = [re.search(r"\.(\d+)\.", path) for path in paths]
    places = [int(one.group(1)) for one in found if one is not None]
    return places if len(set(places)) == len(paths) else None


def _check_experts(chosen: NDArray[Any], facts: RouterFacts) -> None:
    """Refuse routes (N, K) that a router cannot have."""
    if chosen.size and not -1 <= chosen.min() <= chosen.max() < facts.num_experts:
        wrong = chosen.max() if chosen.max() >= facts.num_experts else chosen.min()
        raise ConfigError(
            f"routed_experts has expert {wrong} at router {facts.router}, which has experts 0 to "
            f"{facts.num_experts - 1}"
        )
    if facts.top_k is not None and chosen.shape[1] != facts.top_k:
        raise ConfigError(
            f"routed_experts has {chosen.shape[1]} experts for each token, but router {facts.router} takes "
            f"{facts.top_k}; these are routes of another model"
        )
    ordered = np.sort(chosen, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        raise ConfigError(f"routed_experts has an expert twice at router {facts.router}: {chosen[row].tolist()}")


def _some(numbers: list[int]) -> str:
    """A few of many numbers."""
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
