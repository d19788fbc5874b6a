"""Mixtral, for models of the Llama kind without biases; and Qwen's mixtures: routed experts and, except in Qwen3, a
shared one with a gate of its own."""

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
    size_fields = ("num_local_experts", "num_experts_per_tok", "intermediate_size")

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Attention has no biases."""
        if getattr(config, "attention_bias", False):
            return "its attention has biases (attention_bias), and mixtral's has none"
        return super().refusal(config)


class _Qwen(Container):
    """Softmax over all experts; the weights of the chosen ones are normalised to add up to 1."""

    size_fields = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes, and layers without experts by number."""
        return {
            **super().fields(dense, shape),
            "intermediate_size": shape.dense_width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(shape.dense_layers),
        }

    def layers_refusal(self, shape: MoeShape) -> str | None:
        """Any layer can be without experts."""
        return None


class Qwen3Moe(_Qwen):
    """For Qwen3, with biases in attention or without."""

    name = "qwen3_moe"
    dense = ("qwen3",)
    size_fields = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Either all layers or none have sliding-window attention."""
        if "sliding_attention" in (config.layer_types or ()):
            return "some of its layers attend to a window (use_sliding_window); qwen3_moe has one for all or for none"
        return super().refusal(config)


class Qwen2Moe(_Qwen):
    """For Qwen2 and Seed-OSS, whose queries, keys and values have biases, and for Llama without biases."""

    name = "qwen2_moe"
    dense = ("qwen2", "seed_oss", "llama")
    shared_name = "shared_expert"
    shared_gate_name = "shared_expert_gate.weight"

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Queries, keys and values may have biases, outputs may not."""
        if config.model_type == "llama" and config.attention_bias:
            return "the output of its attention has a bias (attention_bias), and qwen2_moe's has none"
        if getattr(config, "attention_out_bias", False):
            return "the output of its attention has a bias (attention_out_bias), and qwen2_moe's has none"
        return super().refusal(config)

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """As in all of Qwen's; Qwen2 always has biases and no option for them."""
        has_biases = dense.model_type == "qwen2" or dense.attention_bias
        return {
            **super().fields(dense, shape),
            "qkv_bias": has_biases,
            "shared_expert_intermediate_size": shape.shared_width,
        }


class Qwen35Moe(Container):
    """For the text model of Qwen3.5."""

    name = "qwen3_5_moe_text"
    dense = ("qwen3_5_text",)
    size_fields = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    shared_name = "shared_expert"
    shared_gate_name = "shared_expert_gate.weight"

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes."""
        return {**super().fields(dense, shape), "shared_expert_intermediate_size": shape.shared_width}
