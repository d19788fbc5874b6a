"""Make a Qwen3-MoE with random weights, once, without ever holding more than one layer of it.

The checkpoint is laid out as `save_pretrained` writes it: every expert's three matrices under names of their own, in
shards with an index. A shard is a layer here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from benchmarks.harness.shape import Shape

BIAS = 0
"""The hidden dimension that is the same in every token, where routers are to prefer some experts."""

INDEX = "model.safetensors.index.json"

WEIGHT_STD = 0.02
"""Transformers' `initializer_range`."""


def made_model(shape: Shape, parent: Path) -> Path:
    """The folder of the made model below `parent`; makes it if it is not there."""
    folder = parent / shape.name
    if (folder / INDEX).exists():
        return folder
    unfinished = parent / f"{shape.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
    weight_map, total_bytes = {}, 0
    for number, tensors in enumerate(track(_shards(shape), "making the model", shape.layers + 1), start=1):
        file = f"model-{number:05}-of-{shape.layers + 1:05}.safetensors"
        save_file(tensors, unfinished / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    os.sync()
    return unfinished.rename(folder)


def _config(shape: Shape) -> dict[str, object]:
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        norm_topk_prob=True,
        tie_word_embeddings=shape.is_tied,
        bos_token_id=None,
        eos_token_id=None,  # a run must not end early
    )
    return config.to_dict()


def _shards(shape: Shape) -> Iterator[dict[str, Tensor]]:
    """The tensors of each shard, by the names that they have in a checkpoint."""
    random = torch.Generator().manual_seed(shape.seed)

    def draw(*size: int, std: float = WEIGHT_STD) -> Tensor:
        return torch.empty(size).normal_(std=std, generator=random).to(torch.bfloat16)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    embedding = draw(shape.vocab, shape.hidden, std=shape.embedding_std)
    if shape.popularity:
        embedding[:, BIAS] = shape.embedding_std
    head = {} if shape.is_tied else {"lm_head.weight": embedding.clone()}
    yield {"model.embed_tokens.weight": embedding, "model.norm.weight": ones(shape.hidden)} | head
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        tensors = {
            "input_layernorm.weight": ones(shape.hidden),
            "post_attention_layernorm.weight": ones(shape.hidden),
            "self_attn.q_proj.weight": draw(queries, shape.hidden),
            "self_attn.k_proj.weight": draw(keys, shape.hidden),
            "self_attn.v_proj.weight": draw(keys, shape.hidden),
            "self_attn.o_proj.weight": draw(shape.hidden, queries),
            "self_attn.q_norm.weight": ones(shape.head_dim),
            "self_attn.k_norm.weight": ones(shape.head_dim),
            "mlp.gate.weight": draw(shape.experts, shape.hidden),
        }
        if shape.popularity:
            # A router has no bias of its own. Its logits spread by WEIGHT_STD * sqrt(hidden) over the tokens, so this
            # spreads them by `popularity` times as much over the experts.
            logit_std = WEIGHT_STD * math.sqrt(shape.hidden)
            tensors["mlp.gate.weight"][:, BIAS] = draw(shape.experts, std=shape.popularity * logit_std)
        for expert in range(shape.experts):
            prefix = f"mlp.experts.{expert}"
            tensors[f"{prefix}.gate_proj.weight"] = draw(shape.intermediate, shape.hidden)
            tensors[f"{prefix}.up_proj.weight"] = draw(shape.intermediate, shape.hidden)
            tensors[f"{prefix}.down_proj.weight"] = draw(shape.hidden, shape.intermediate)
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
