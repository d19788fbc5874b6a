"""Containers that were made for one dense family, by its own developers: OLMo, ERNIE, Hunyuan, Cohere, LFM,
Granite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import Container, DensePrefix, Matrix, MoeShape, SharedMultiple


class FlexOlmo(Container):
    """For OLMo 2: norms after attention and block, and over all of queries and keys."""

    name = "flex_olmo"
    dense = ("olmo2",)


class Ernie45Moe(SharedMultiple):
    """For ERNIE 4.5, whose rotary embedding rotates neighbouring channels."""

    name = "ernie4_5_moe"
    dense = ("ernie4_5",)
    size_fields = ("moe_num_experts", "moe_k", "moe_intermediate_size")
    shared_name = "shared_experts"
    zero_names = ("moe_statics.e_score_correction_bias",)

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Experts have no biases, and `use_bias` sets biases everywhere."""
        if config.use_bias:
            return "it has biases everywhere (use_bias), which experts have no place for"
        return super().refusal(config)

    def layers_refusal(self, shape: MoeShape) -> str | None:
        """Layers with experts must be contiguous."""
        first, last = shape.layers[0], shape.layers[-1]
        if shape.layers != tuple(range(first, last + 1)):
            return f"{self.name} has experts in all layers from a first to a last one, and some between are left out"
        return None

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes and layers."""
        return {
            **super().fields(dense, shape),
            "moe_num_shared_experts": shape.shared_width // shape.width,
            "moe_layer_start_index": shape.layers[0],
            "moe_layer_end_index": shape.layers[-1],
            "moe_layer_interval": 1,
        }


class HunYuanMoe(Container):
    """For Hunyuan; its shared block is always there, as wide as an expert, and zero where none is asked for."""

    name = "hunyuan_v1_moe"
    dense = ("hunyuan_v1_dense",)
    size_fields = ("num_experts", "moe_topk", "intermediate_size")
    router_name = "gate.wg.weight"
    shared_name = "shared_mlp"

    def fitted(self, shape: MoeShape) -> MoeShape:
        """One width for all."""
        width = max(shape.width, shape.shared_width)
        return replace(shape, width=width, shared_width=width)


class Cohere2Moe(SharedMultiple):
    """For Command R7B and its kin: attention and block side by side, windows in most layers."""

    name = "cohere2_moe"
    dense = ("cohere2",)
    shared_name = "shared_experts"

    def layers_refusal(self, shape: MoeShape) -> str | None:
        """Any layer can be without experts."""
        return None

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes and layers."""
        return {
            **super().fields(dense, shape),
            "num_shared_experts": shape.shared_width // shape.width,
            "shared_expert_combination_strategy": "sum",
            "expert_selection_fn": "softmax",
            "mlp_layer_types": ["sparse" if n in shape.layers else "dense" for n in range(shape.num_layers)],
            "prefix_dense_intermediate_size": shape.dense_width,
        }


class Lfm2Moe(DensePrefix):
    """For LFM2: convolutions in most layers."""

    name = "lfm2_moe"
    dense = ("lfm2",)
    size_fields = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    ffn_path = "model.layers.{layer}.feed_forward"
    ffn_names = ("w1", "w3", "w2")
    block_path = "model.layers.{layer}.feed_forward"
    expert_names = ("w1", "w3", "w2")
    scores = "sigmoid"

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes and layers; the dense class may round its width, so the width of the stored tensors counts.

        The weights of a token's experts add up to s / (s + 1e-6), where s is the sum of their scores: to 1, but for
        routers whose scores are all tiny.
        """
        return {**super().fields(dense, shape), "num_dense_layers": len(shape.dense_layers), "use_expert_bias": False}


class GraniteMoe(Container):
    """For Granite, with its multipliers: softmax over the chosen experts, a layer's experts in one tensor."""

    name = "granitemoe"
    dense = ("granite",)
    block_path = "model.layers.{layer}.block_sparse_moe"
    router_name = "router.layer.weight"
    size_fields = ("num_local_experts", "num_experts_per_tok", "intermediate_size")

    def experts(self, layer: int, num_experts: int) -> Mapping[str, tuple[Matrix, ...]]:
        """input_linear (E, 2I, H), an expert's gate and then its up; output_linear (E, H, I)."""
        return {
            f"{self.block(layer)}.input_linear.weight": tuple(
                Matrix(expert, role) for expert in range(num_experts) for role in ("gate", "up")
            ),
            f"{self.block(layer)}.output_linear.weight": tuple(Matrix(expert, "down") for expert in range(num_experts)),
        }


class GraniteMoeShared(GraniteMoe):
    """The same with a shared expert."""

    name = "granitemoeshared"
    shared_name = "shared_mlp"

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes."""
        return {**super().fields(dense, shape), "shared_intermediate_size": shape.shared_width}

    def shared(self, layer: int) -> Mapping[str, tuple[Matrix, ...]]:
        """input_linear (2S, H), output_linear (H, S); beside the block, not in it."""
        path = f"model.layers.{layer}.{self.shared_name}"
        return {
            f"{path}.input_linear.weight": (Matrix(None, "gate"), Matrix(None, "up")),
            f"{path}.output_linear.weight": (Matrix(None, "down"),),
        }
