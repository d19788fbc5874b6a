"""Containers of the DeepSeek kind: sigmoid scores, a correction of the router's choice, shared experts without a gate.

The correction must exist and is zero; scores are normalised to add up to 1 and are not scaled; there is one group.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import Container, DensePrefix, MoeShape, SharedMultiple


class _Sigmoid(SharedMultiple):
    """The common part of these containers."""

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
        """Sizes, and a router without groups and scaling."""
        return {
            **super().fields(dense, shape),
            "intermediate_size": shape.dense_width,
            "n_shared_experts": shape.shared_width // shape.width,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }


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

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """As in all of these, but without a width of dense layers: the class has none."""
        fields = super().fields(dense, shape)
        return {name: value for name, value in fields.items() if name != "intermediate_size"}
