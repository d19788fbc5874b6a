"""The interface of containers: which dense models one can hold, with which config, and under which names on disk.

A container is a mixture-of-experts class of Transformers whose layers are, but for the feed-forward block, those of a
dense class. This is checked: `builder/plan` compares names and shapes with those that the class itself would save,
`builder/checks` compares logits with the dense model's.
"""

# E experts, H hidden size, I width of an expert, S width of the shared block

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig

ROLES = ("gate", "up", "down")
"""The matrices of a gated feed-forward block, (I, H), (I, H) and (H, I), in the order in which they are written."""

_OWN = ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "auto_map")
"""Fields of a config that are about itself, not about the model."""
_PLAIN_ROUTING = {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
"""What routers do in containers whose classes have these fields: a token's weights add up to 1 and are not scaled, and
the experts are in one group."""


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a mixture."""

    num_experts: int
    experts_per_token: int
    width: int
    """Channels of a routed expert."""
    dense_width: int
    """Channels of the base model's blocks, which layers without experts keep."""
    num_layers: int
    layers: tuple[int, ...]
    """Layers with experts."""
    shared_width: int = 0
    """Channels of the block that every token visits; 0 where there is none."""
    is_shared_gated: bool = False

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers without experts."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.layers)


class Matrix(NamedTuple):
    """One matrix of an expert."""

    expert: int | None
    """None for the shared block."""
    role: str


class Container:
    """The common case: experts one by one on disk, beside a router, in place of the dense block."""

    name: str
    """Its model type."""
    dense: tuple[str, ...]
    """Model types that it may hold."""
    ffn_path = "model.layers.{layer}.mlp"
    """Where the dense class has its block."""
    ffn_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The dense class's names of its matrices, by role; the container's layers without experts have the same."""
    block_path = "model.layers.{layer}.mlp"
    """Where a checkpoint of the container has its block."""
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router_name = "gate.weight"
    size_fields = ("num_experts", "num_experts_per_tok", "intermediate_size")
    """The config's fields for the number of experts, of a token's experts, and for the width of an expert."""
    shared_name: str | None = None
    """The block that every token visits; None where the class has none."""
    shared_gate_name: str | None = None
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How its routers turn logits into scores."""
    zero_names: tuple[str, ...] = ()
    """Tensors of the block that must exist and be zero: corrections to the router's choice."""

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Why a dense model does not fit; None if it may."""
        if getattr(config, "mlp_bias", False):
            return "its feed-forward blocks have biases (mlp_bias), which experts have no place for"
        return None

    def shape_refusal(self, shape: MoeShape) -> str | None:
        """Why these sizes do not fit; None if they do."""
        if shape.shared_width and self.shared_name is None:
            return f"{self.name} has no shared experts"
        if shape.is_shared_gated and self.shared_gate_name is None:
            return f"{self.name} has no gate for its shared expert"
        return self.layers_refusal(shape)

    def layers_refusal(self, shape: MoeShape) -> str | None:
        """Why these layers cannot be the ones with experts."""
        if shape.dense_layers:
            return f"{self.name} has experts in every layer, and layers {few(shape.dense_layers)} are to have none"
        return None

    def fitted(self, shape: MoeShape) -> MoeShape:
        """The nearest larger sizes that the class can have; what is added is zero and changes nothing."""
        return shape

    def fields(self, dense: PreTrainedConfig, shape: MoeShape) -> dict[str, Any]:
        """The fields of the config that make it a mixture, and those that the dense class does not have."""
        sizes = (shape.num_experts, shape.experts_per_token, shape.width)
        return dict(zip(self.size_fields, sizes, strict=True))

    def config(self, dense: PreTrainedConfig, shape: MoeShape) -> PreTrainedConfig:
        """The container's config: the dense model's, as far as the class knows its fields, and the mixture's.

        Starts from the dense model's because the classes' defaults differ, even in `rope_theta` and `rms_norm_eps`.
        """
        cls = CONFIG_MAPPING[self.name]
        plain = {"intermediate_size": shape.dense_width, **_PLAIN_ROUTING}
        known = cls().to_dict()
        fields = {name: value for name, value in plain.items() if name in known}
        return cls(**{**carried(dense, cls), **fields, **self.fields(dense, shape)})

    def ffn(self, layer: int) -> str:
        """Where the dense class has a layer's block."""
        return self.ffn_path.format(layer=layer)

    def block(self, layer: int) -> str:
        """Where a checkpoint of the container has it."""
        return self.block_path.format(layer=layer)

    def dense_matrices(self, layer: int) -> dict[str, str]:
        """The tensors of a dense block by role."""
        return {role: f"{self.ffn(layer)}.{name}.weight" for role, name in zip(ROLES, self.ffn_names, strict=True)}

    def router(self, layer: int) -> str:
        """The tensor (E, H) of a layer's router."""
        return f"{self.block(layer)}.{self.router_name}"

    def shared_gate(self, layer: int) -> str | None:
        """The tensor (1, H) of the gate of the shared block, where there is one."""
        return f"{self.block(layer)}.{self.shared_gate_name}" if self.shared_gate_name else None

    def zeros(self, layer: int) -> tuple[str, ...]:
        """Tensors that are zero."""
        return tuple(f"{self.block(layer)}.{name}" for name in self.zero_names)

    def experts(self, layer: int, num_experts: int) -> Mapping[str, tuple[Matrix, ...]]:
        """The tensors that hold a layer's experts, each with the matrices that it consists of, one after another."""
        return {
            f"{self.block(layer)}.experts.{expert}.{name}.weight": (Matrix(expert, role),)
            for expert in range(num_experts)
            for role, name in zip(ROLES, self.expert_names, strict=True)
        }

    def shared(self, layer: int) -> Mapping[str, tuple[Matrix, ...]]:
        """The same for the shared block."""
        if self.shared_name is None:
            return {}
        return {
            f"{self.block(layer)}.{self.shared_name}.{name}.weight": (Matrix(None, role),)
            for role, name in zip(ROLES, self.ffn_names, strict=True)
        }


def carried(config: PreTrainedConfig, cls: Any) -> dict[str, Any]:
    """The fields of a config that another class of configs has, too."""
    known = {*cls().to_dict(), "head_dim"} - {*_OWN}
    return {name: value for name, value in config.to_dict().items() if name in known and value is not None}


class DensePrefix(Container):
    """Containers whose layers without experts are the first layers."""

    def layers_refusal(self, shape: MoeShape) -> str | None:
        """Only the first layers can be without experts."""
        if shape.dense_layers != tuple(range(len(shape.dense_layers))):
            return (
                f"{self.name} can have layers without experts at the beginning only, and layers "
                f"{few(shape.dense_layers)} are to have none"
            )
        return None


class SharedMultiple(Container):
    """Containers that count shared experts as wide as a routed one."""

    def fitted(self, shape: MoeShape) -> MoeShape:
        """A shared block of whole experts' width."""
        return replace(shape, shared_width=-(-shape.shared_width // shape.width) * shape.width)


def few(some: Sequence[object]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(map(str, some[:3])) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
