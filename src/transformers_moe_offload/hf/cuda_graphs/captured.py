"""One captured step of a model: inputs are copied into its buffers, and outputs are copied out of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from transformers.cache_utils import Cache, StaticCache

from transformers_moe_offload.hf.cuda_graphs.graph import graph_on
from transformers_moe_offload.hf.cuda_graphs.static_cache import StaticPast, counts, set_counts, shape_of
from transformers_moe_offload.hf.upstream import kv_cache_name


class CapturedStep:
    """A step for inputs and caches of one shape."""

    def __init__(self, model: Callable[..., Any], inputs: Mapping[str, Any], device: torch.device) -> None:
        """Captures a call of the model, but computes nothing. Raises `RuntimeError` if it cannot be captured."""
        leaves, self._structure = _pytree.tree_flatten(_others(inputs))
        self._buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        name = kv_cache_name(inputs)
        assert name is not None
        self._past_name = name
        """Name of the input that is not copied, but written to in place."""
        cache = inputs[name]
        self._past = StaticPast(cache)
        self._num_new = _num_new(inputs)
        self._graph = graph_on(device)
        before = counts(cache)
        try:
            self._graph.capture(lambda: self._run(model), self._past.tensors)
        finally:
            set_counts(cache, before)

    def serves(self, cache: StaticCache) -> bool:
        """Whether the step can use this KV cache; False while another cache uses it."""
        return self._past.serve(cache)

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """The model's outputs for these inputs, whose KV cache must be one that the step `serves`."""
        for buffer, leaf in zip(self._buffers, _pytree.tree_leaves(_others(inputs)), strict=True):
            if isinstance(leaf, Tensor):
                buffer.copy_(leaf, non_blocking=True)
        cache = self._past.owner
        before = counts(cache)
        self._past.as_captured()
        outputs = self._graph.replay()
        set_counts(cache, before, more=self._num_new)
        return _pytree.tree_map(lambda leaf: _copied(leaf, cache), outputs)

    def _run(self, model: Callable[..., Any]) -> Any:
        inputs = _pytree.tree_unflatten(self._buffers, self._structure)
        outputs = model(**inputs, **{self._past_name: self._past.owner})
        # The outputs live as long as the step and must not keep the cache alive.
        return _pytree.tree_map(lambda leaf: _THE_CACHE if _is_cache(leaf) else leaf, outputs, is_leaf=_is_cache)


def signature(inputs: Mapping[str, Any]) -> Hashable | None:
    """A key that is equal for inputs which can share one captured step; None if they cannot be captured."""
    leaves, structure = _pytree.tree_flatten(_others(inputs))
    found: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append((leaf.shape, leaf.dtype, leaf.device))
        elif leaf is None or isinstance(leaf, int | float | str | torch.dtype):
            found.append((type(leaf), leaf))
        else:
            return None
    return (
        tuple(found),
        repr(structure),
        shape_of(past_in(inputs), _num_new(inputs)),
        torch.is_inference_mode_enabled(),
    )


def past_in(inputs: Mapping[str, Any]) -> Any:
    """The KV cache among the inputs of a step; None if there is none."""
    name = kv_cache_name(inputs)
    return None if name is None else inputs[name]


def num_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of all rows of a batch."""
    return int(prod(_shape(inputs)))


def _num_new(inputs: Mapping[str, Any]) -> int:
    """Tokens of each row."""
    return _shape(inputs)[1]


def _shape(inputs: Mapping[str, Any]) -> torch.Size:
    ids = inputs.get("input_ids")
    return inputs["inputs_embeds"].shape[:2] if ids is None else ids.shape


def _others(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not isinstance(value, Cache)}


class _TheCache:
    """Placeholder for the KV cache among a step's outputs."""


_THE_CACHE = _TheCache()


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, Cache)


def _copied(leaf: Any, cache: StaticCache) -> Any:
    """An output that the caller may keep: tensors are cloned, the placeholder is replaced by the cache."""
    if leaf is _THE_CACHE:
        return cache
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
