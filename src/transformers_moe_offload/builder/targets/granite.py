"""Granite's mixtures: for Granite, with its multipliers; experts of a layer lie in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from transformers_moe_offload.builder.targets.base import Container, Matrix, MoeShape


class GraniteMoe(Container):
    """Softmax over the chosen experts."""

    name = "granitemoe"
    dense = ("granite",)
    block_path = "model.layers.{layer}.block_sparse_moe"
    router_name = "router.layer.weight"

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """Sizes."""
        return {
            "num_local_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "intermediate_size": shape.width,
        }

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
