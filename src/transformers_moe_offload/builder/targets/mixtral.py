"""Mixtral: for models of the Llama kind without biases."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import Container, MoeShape


class Mixtral(Container):
    """Softmax over the chosen experts; a sliding window as in Mistral."""

    name = "mixtral"
    dense = ("llama", "mistral")
    block_path = "model.layers.{layer}.block_sparse_moe"
    expert_names = ("w1", "w3", "w2")

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Attention has no biases."""
        if getattr(config, "attention_bias", False):
            return "its attention has biases (attention_bias), and mixtral's has none"
        return super().refusal(config)

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes."""
        return {
            "num_local_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "intermediate_size": shape.width,
        }
