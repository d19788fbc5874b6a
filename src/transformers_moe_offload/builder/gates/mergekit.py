"""Gates as mergekit-moe 0.1.5 computes them, to the last bit: for recipes of mergekit's, and to compare with.

Its prompts are one left-padded batch with the beginning-of-text token put in front and used as pad, the base model runs
in bfloat16, and vectors are read where a decoder layer begins. `hidden` is the last token; `hidden_avg` counts pads;
`cheap_embed` sums embeddings in float32. Reference: tests/builder/gates/test_mergekit.py.
"""

# P prompts, T tokens in each, E experts, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.builder.gates.rows import drawn_rows
from transformers_moe_offload.builder.layerwise.run import run
from transformers_moe_offload.builder.layerwise.skeleton import Skeleton, layer_path
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.builder.sources.base import Source
from transformers_moe_offload.builder.texts.expert_texts import Texts
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted

MODES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform")


def mergekit_rows(
    gate: Gate,
    texts: Sequence[Texts],
    base: Source,
    tokenizer: Any,
    ffn: Mapping[int, str],
    *,
    device: str,
    advance: Callable[[int], None] | None,
) -> dict[int, Tensor]:
    """By layer: rows (E, H) in float32, with the values that mergekit has in bfloat16 or float32."""
    expect_mergekit(gate, texts)
    hidden_size, num_layers = base.config.hidden_size, base.config.num_hidden_layers
    if gate.mode in ("random", "uniform"):
        rows = drawn_rows(gate.mode, num_layers, len(texts), hidden_size, seed=gate.seed, initializer_range=0.0)
        return {layer: rows[layer] for layer in ffn}
    if tokenizer is None:
        raise RecipeError("the base model has no tokenizer, which prompts need; add its files to its folder")
    batches = list(_batches(texts, _prepared(tokenizer)))
    if gate.mode == "cheap_embed":
        of_every_layer = _embedded(batches, base, next(iter(ffn.values())))
        return dict.fromkeys(ffn, of_every_layer)
    paths = {layer: [layer_path(layer, block)] for layer, block in ffn.items()}
    taker = _Taker(batches, average=gate.mode == "hidden_avg")
    run(base, batches, paths, taker, dtype=torch.bfloat16, device=device, advance=advance)
    return taker.rows


def expect_mergekit(gate: Gate, texts: Sequence[Texts]) -> None:
    """Refuse gates and texts that mergekit does not support."""
    if gate.mode not in MODES:
        raise RecipeError(
            f"gate.scoring='mergekit' does not go with gate.mode={quoted(gate.mode)}, which mergekit lacks; it has "
            f"{', '.join(MODES)}; set scoring: ours"
        )
    if gate.scale != "auto":
        raise RecipeError(
            f"gate.scoring='mergekit' does not go with gate.scale={gate.scale}: mergekit's rows are not scaled; set "
            f"scoring: ours, or leave scale out"
        )
    if gate.mode in ("random", "uniform"):
        return
    for expert in texts:
        if not any(text.strip() for text in expert.positive):
            raise RecipeError(
                f"gate mode {quoted(gate.mode)} of mergekit reads prompts, but expert {quoted(expert.name)} has no "
                f"positive_prompts that say something; give it some, or set gate.mode to random"
            )
        if expert.dataset is not None:
            raise RecipeError(
                f"expert {quoted(expert.name)} has a dataset, which mergekit cannot read; set gate.scoring to ours, "
                "or leave the dataset out"
            )
    if len(texts) > 1 and len({(expert.positive, expert.negative) for expert in texts}) == 1:
        raise RecipeError(
            f"all {len(texts)} experts have the same prompts, so no gate can tell them apart; give them prompts of "
            f"their own, or set gate.mode to random"
        )


@dataclass(frozen=True)
class _Prompts:
    """One list of prompts."""

    expert: int
    is_negative: bool
    tokens: Tensor
    """(P, T) int64, padded on the left."""
    attention_mask: Tensor
    """(P, T) int64."""


def _prepared(tokenizer: Any) -> Any:
    """A copy of the tokenizer that pads on the left with the beginning-of-text token; the original is left alone."""
    prepared = deepcopy(tokenizer)
    prepared.padding_side = "left"
    prepared.pad_token_id = prepared.bos_token_id
    if prepared.pad_token_id is None:
        prepared.pad_token = prepared.eos_token
    return prepared


def _batches(texts: Sequence[Texts], tokenizer: Any) -> Iterator[_Prompts]:
    for number, expert in enumerate(texts):
        for is_negative, prompts in ((False, expert.positive), (True, expert.negative)):
            if prompts:
                encoded = tokenizer(
                    [(tokenizer.bos_token or "") + prompt for prompt in prompts],
                    return_tensors="pt",
                    padding=True,
                    add_special_tokens=False,
                    verbose=False,
                )
                yield _Prompts(number, is_negative, encoded["input_ids"], encoded["attention_mask"])


def _combined(vectors: Mapping[tuple[int, bool], Tensor]) -> Tensor:
    """Rows (E, H): an expert's vector (H,) less that of its negative prompts, at length 1, in the vectors' dtype."""
    rows = []
    for expert in sorted({expert for expert, _ in vectors}):
        vector = vectors[expert, False]
        if (expert, True) in vectors:
            vector = vector - vectors[expert, True]
        rows.append(vector / vector.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-8))
    return torch.stack(rows).float()


class _Taker:
    def __init__(self, batches: Sequence[_Prompts], *, average: bool) -> None:
        self._batches, self._average = batches, average
        self._vectors: dict[tuple[int, bool], Tensor] = {}
        self.rows: dict[int, Tensor] = {}

    def seen(self, layer: int, path: str, batch: int, hidden: Tensor) -> None:
        prompts = self._batches[batch]
        pooled = hidden.sum(1) / hidden.shape[1] if self._average else hidden[:, -1]
        self._vectors[prompts.expert, prompts.is_negative] = (pooled.sum(0) / len(pooled)).cpu()

    def passed(self, layer: int) -> None:
        self.rows[layer] = _combined(self._vectors)
        self._vectors = {}


def _embedded(batches: Sequence[_Prompts], base: Source, ffn_path: str) -> Tensor:
    model = Skeleton(base, [ffn_path], torch.float32, "cpu")
    vectors = {}
    for prompts, embedded in zip(batches, model.embedded([prompts.tokens for prompts in batches]), strict=True):
        total = (embedded * prompts.attention_mask[..., None]).sum(1).sum(0)
        vectors[prompts.expert, prompts.is_negative] = total / total.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return _combined(vectors)
