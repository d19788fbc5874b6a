"""Containers of models of the Llama and Qwen kinds: Mixtral, without biases; Qwen's mixtures, with routed experts and,
except in Qwen3, a shared one with a gate of its own; and those with sigmoid scores."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import Container, DensePrefix, MoeShape, SharedMultiple


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
        return {**super().fields(dense, shape), "decoder_sparse_step": 1, "mlp_only_layers": list(shape.dense_layers)}

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


class _Sigmoid(SharedMultiple):
    """The DeepSeek kind: sigmoid scores, a correction of the router's choice, shared experts without a gate.

    The correction must exist and is zero.
    """

    shared_name = "shared_experts"
    scores = "sigmoid"
    size_fields = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    zero_names = ("gate.e_score_correction_bias",)

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Outputs of attention have no bias."""
        if config.model_type == "llama" and config.attention_bias:
            return f"the output of its attention has a bias (attention_bias), and {self.name}'s has none"
        return super().refusal(config)

    def shape_refusal(self, shape: MoeShape) -> str | None:
        """The router looks for the two best experts of each group, so there must be at least two."""
        if shape.num_experts < 2:
            return f"{self.name} needs at least 2 experts"
        return super().shape_refusal(shape)

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes."""
        return {**super().fields(dense, shape), "n_shared_experts": shape.shared_width // shape.width}


class _WithPrefix(DensePrefix, _Sigmoid):
    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """As in all of these, and the number of layers without experts, which come first."""
        return {**super().fields(dense, shape), "first_k_dense_replace": len(shape.dense_layers)}


class Dots1(_WithPrefix):
    """For Qwen3, windows of attention included."""

    name = "dots1"
    dense = ("qwen3",)


class Glm4Moe(_WithPrefix):
    """For Llama, and for Qwen3 without windows."""

    name = "glm4_moe"
    dense = ("qwen3", "llama")

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """No windows; outputs of attention have no bias."""
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return "some of its layers attend to a window (use_sliding_window), and glm4_moe's do not"
        if config.attention_bias:
            return "the output of its attention has a bias (attention_bias), and glm4_moe's has none"
        return super().refusal(config)

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """As in all of these; by default this class rotates only half of each head."""
        return {
            **super().fields(dense, shape),
            "use_qk_norm": dense.model_type == "qwen3",
            "rope_parameters": {"partial_rotary_factor": 1.0, **dense.rope_parameters},
            "num_nextn_predict_layers": 0,
        }


class SolarOpen(_Sigmoid, Container):
    """For Llama."""

    name = "solar_open"
    dense = ("llama",)
