"""Which tensors of a checkpoint belong to which expert: found by names and shapes, in headers and config only."""

# E experts, H hidden size

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from transformers_moe_offload.builder.plan.tensors import Parameters
from transformers_moe_offload.builder.targets import BY_NAME, Container
from transformers_moe_offload.errors import CheckpointError, UnsupportedModelError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.tensor_files.index import StoredTensor, check_index_file, read_index
from transformers_moe_offload.untrusted import json_object

_ONE_BY_ONE = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)")
_LAYER = re.compile(r"\.(\d+)\.")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class SparseBlock:
    """One layer's experts and router."""

    layer: int
    experts: Mapping[str, tuple[int, str]]
    """Tensors of one expert each -> the expert's number, and the name with `{}` in place of the number."""
    stacked: Mapping[str, int]
    """Tensors with a part for every expert -> the dimension that counts the experts."""
    router: str
    """The one of `stacked` that is the router's weight, (E, H)."""


@dataclass(frozen=True)
class SparseCheckpoint:
    """A checkpoint with experts."""

    folder: Path
    config: Mapping[str, Any]
    """`config.json`."""
    tensors: Mapping[str, StoredTensor]
    blocks: tuple[SparseBlock, ...]
    num_experts: int

    @classmethod
    def of(cls, folder: Path) -> SparseCheckpoint:
        """Read a folder; raises an error of ours unless its checkpoint has experts that can be told apart."""
        config = json_object(folder / CONFIG_NAME)
        weights = sorted(folder.glob("model*.safetensors"))
        if not weights:
            raise CheckpointError(f"{folder} holds no model.safetensors; only plain safetensors checkpoints are edited")
        tensors = read_index(weights)
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            check_index_file(index, tensors)
        blocks = blocks_of(config, tensors)
        if not blocks:
            raise UnsupportedModelError(
                f"{folder} ({config.get('model_type')}) stores no experts one by one; only such checkpoints, and those "
                f"that `build` writes, can be edited"
            )
        counts = {len({expert for expert, _ in block.experts.values()}) for block in blocks if block.experts}
        counts |= {tensors[name].shape[axis] for block in blocks for name, axis in block.stacked.items()}
        if len(counts) != 1:
            raise UnsupportedModelError(f"{folder} has layers of {sorted(counts)} experts; all need as many")
        return cls(folder, config, tensors, blocks, counts.pop())

    @cached_property
    def container(self) -> Container | None:
        """The container of its model type; None if the builder has none."""
        return BY_NAME.get(str(self.config.get("model_type")))

    @property
    def experts_per_token(self) -> int:
        """How many experts a token visits."""
        return next((int(self.config[name]) for name in _PER_TOKEN if isinstance(self.config.get(name), int)), 1)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.tensors[self.blocks[0].router].shape[1]

    def width_of(self, block: SparseBlock) -> int:
        """I: channels of the experts of one layer."""
        assert self.container is not None
        tensors = self.container.experts(block.layer, self.num_experts)
        return next(self.tensors[name].shape[-1] for name, (first, *_) in tensors.items() if first.role == "down")

    def spec(self, like: str, name: str | None = None, *, axis: int = 0, more: int = 0) -> FieldSpec:
        """A tensor of the shape and dtype of another one, with `more` entries along an axis."""
        shape = list(self.tensors[like].shape)
        shape[axis] += more
        return FieldSpec(name or like, tuple(shape), self.tensors[like].dtype)

    def config_for(self, num_experts: int) -> dict[str, Any]:
        """The config with another number of experts; raises an error of ours if the router could not work with it."""
        names = [name for name in _COUNTS if self.config.get(name) == self.num_experts]
        if not names:
            raise UnsupportedModelError(
                f"{self.folder / CONFIG_NAME} has none of {', '.join(_COUNTS)} equal to "
                f"{self.num_experts}, the number of experts"
            )
        if num_experts < self.experts_per_token:
            raise UnsupportedModelError(
                f"a token visits {self.experts_per_token} experts, and there would be {num_experts}; lower "
                f"num_experts_per_tok in {self.folder / CONFIG_NAME} first"
            )
        groups = self.config.get("n_group") or 1
        if num_experts % groups:
            raise UnsupportedModelError(
                f"its router has {groups} groups (n_group), which {num_experts} experts cannot be dealt to equally"
            )
        return {**self.config, **dict.fromkeys(names, num_experts)}


def blocks_of(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[SparseBlock, ...]:
    """The sparse layers, given the config and anything with shapes by name; empty where experts cannot be told
    apart."""
    return tuple(_one_by_one(tensors) or _by_container(config, tensors))


def parameters_of(
    tensors: Mapping[str, tuple[int, ...]], blocks: tuple[SparseBlock, ...], per_token: int
) -> Parameters:
    """How many numbers a checkpoint has, given the shapes of its tensors."""
    routed = {name for block in blocks for name in block.experts}
    stacked = {name: axis for block in blocks for name, axis in block.stacked.items()}
    routers = {name for name in stacked if len(tensors[name]) < 3}
    num_experts = max((tensors[name][stacked[name]] for name in routers), default=1)

    def kind(name: str) -> str:
        if name in routers:
            return "routers"
        if name in routed or name in stacked:
            return "experts"
        return "shared" if "shared_" in name else "stem"

    return Parameters.counted(((kind(name), shape) for name, shape in tensors.items()), per_token, num_experts)


def _one_by_one(tensors: Mapping[str, Any]) -> list[SparseBlock]:
    """The sparse layers of checkpoints whose experts have numbers in their names."""
    experts: dict[str, dict[str, tuple[int, str]]] = {}
    for name in tensors:
        found = _ONE_BY_ONE.fullmatch(name)
        if found:
            place = f"{found['block']}.experts.{{}}.{found['rest']}"
            experts.setdefault(found["block"], {})[name] = (int(found["expert"]), place)
    return [_block(path, of_block, tensors) for path, of_block in experts.items()]


def _block(path: str, experts: Mapping[str, tuple[int, str]], tensors: Mapping[str, Any]) -> SparseBlock:
    count = len({expert for expert, _ in experts.values()})
    stacked = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{path}.") and name not in experts and "shared" not in name:
            axis = next((axis for axis, size in enumerate(tensor.shape) if size == count), None)
            if axis is not None:
                stacked[name] = axis
    return SparseBlock(_layer(path), experts, stacked, _router(path, stacked, tensors))


def _by_container(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[SparseBlock]:
    """The sparse layers of a checkpoint whose container stacks a layer's experts."""
    container = BY_NAME.get(str(config.get("model_type")))
    if container is None:
        return []
    blocks = []
    for layer in range(int(config.get("num_hidden_layers", 0))):
        names = {name for name in container.experts(layer, 2) if name in tensors}
        router = container.router(layer)
        if names and router in tensors:
            blocks.append(SparseBlock(layer, {}, dict.fromkeys((*sorted(names), router), 0), router))
    return blocks


def _router(path: str, stacked: Mapping[str, int], tensors: Mapping[str, Any]) -> str:
    routers = [name for name, axis in stacked.items() if axis == 0 and len(tensors[name].shape) == 2]
    if len(routers) != 1:
        raise UnsupportedModelError(f"{path} has {len(routers)} tensors that could be its router, not one: {routers}")
    return routers[0]


def _layer(path: str) -> int:
    found = _LAYER.search(f"{path}.")
    return int(found[1]) if found else 0
