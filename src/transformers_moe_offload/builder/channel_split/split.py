"""The parts of every layer's block, as a recipe asks for them."""

# I channels, B windows, T tokens in each, H hidden

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.builder.channel_split.parts import (
    Parts,
    active,
    co_activation_parts,
    k_means_parts,
    random_parts,
)
from transformers_moe_offload.builder.layerwise.run import run
from transformers_moe_offload.builder.recipe import Split
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.expert_texts import Texts
from transformers_moe_offload.builder.texts.windows import Windows, window_length, windows_of
from transformers_moe_offload.errors import RecipeError

_GATE, _DOWN = ("gate_proj", "w1"), ("down_proj", "w2")
"""Names of these matrices in families of models."""


def channels_of(
    split: Split,
    base: Source,
    tokenizer: Any,
    ffn: Mapping[int, str],
    *,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> Callable[[int], Parts]:
    """Layer -> the channels of each part of its block; the first `split.shared` parts are the shared ones.

    `k_means` clusters the rows of the gate projection, which decide when a channel is active. `co_activation` runs the
    calibration text through the model before this function returns.
    """
    if split.method == "co_activation":
        chosen = _by_activation(split, base, tokenizer, ffn, device=device, advance=advance)
        return chosen.__getitem__

    @cache
    def parts(layer: int) -> Parts:
        rows = base.read(f"{_module(base, ffn[layer], _GATE)}.weight")
        if split.method == "random":
            return random_parts(len(rows), split.num_experts, seed=split.seed + layer)
        return k_means_parts(rows, split.num_experts, seed=split.seed)

    return parts


def _by_activation(
    split: Split,
    base: Source,
    tokenizer: Any,
    ffn: Mapping[int, str],
    *,
    device: str,
    advance: Callable[[int], None] | None,
) -> dict[int, Parts]:
    if split.dataset is None:
        raise RecipeError(
            "split.method: co_activation goes by what is active on some text; set split.dataset, or another method"
        )
    texts = [Texts("split", (), (), split.dataset)]
    windows = windows_of(texts, tokenizer, length=window_length(base.config), skip_bos=True)
    watched = {layer: [_module(base, block, _DOWN)] for layer, block in sorted(ffn.items())}
    taker = _Taker(split, windows)
    run(base, windows.batches, watched, taker, device=device, advance=advance)
    return taker.parts


class _Taker:
    """Computes parts from the inputs of the down projection: the channels' activations."""

    def __init__(self, split: Split, windows: Windows) -> None:
        self._split, self._windows = split, windows
        self._active: list[Tensor] = []
        self.parts: dict[int, Parts] = {}

    def seen(self, layer: int, path: str, batch: int, hidden: Tensor) -> None:
        sampled = self._windows.batches[batch].sampled.to(hidden.device)
        self._active.append(active(hidden[sampled]).cpu())  # sync: device -> host

    def passed(self, layer: int) -> None:
        split = self._split
        together = torch.cat(self._active)
        self.parts[layer] = co_activation_parts(together, split.num_experts, num_shared=split.shared, seed=split.seed)
        self._active = []


def _module(base: Source, block: str, names: tuple[str, ...]) -> str:
    for name in names:
        if f"{block}.{name}.weight" in base.tensors:
            return f"{block}.{name}"
    raise RecipeError(f"{base.name} has none of {', '.join(names)} in {block}, so its channels cannot be told apart")
