"""Where the weights of a new expert come from: a dense model, or another expert of the same mixture."""

# E experts, I width of an expert

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from transformers_moe_offload.builder.edit.expert_tensors import SparseBlock, SparseCheckpoint
from transformers_moe_offload.builder.recipe import Expert
from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.builder.targets import Container, Matrix
from transformers_moe_offload.builder.weights.blocks import Block, Blocks, Part
from transformers_moe_offload.errors import RecipeError, UnsupportedModelError
from transformers_moe_offload.tensor_files.reading import read_stored


class Donor(Protocol):
    """Gives an expert's tensors."""

    def one(self, block: SparseBlock, place: str) -> Tensor:
        """The new expert's values of a tensor of one expert; `place` is its name with `{}` for the expert's number."""

    def part(self, block: SparseBlock, name: str) -> Tensor:
        """The new expert's part of a tensor that holds all experts."""


@dataclass(frozen=True)
class Copied(Donor):
    """An expert of the mixture itself."""

    checkpoint: SparseCheckpoint
    number: int

    def one(self, block: SparseBlock, place: str) -> Tensor:
        """The copied expert's tensor."""
        return read_stored(self.checkpoint.tensors[place.format(self.number)])

    def part(self, block: SparseBlock, name: str) -> Tensor:
        """The copied expert's tensor."""
        return read_stored(self.checkpoint.tensors[name]).select(block.stacked[name], self.number)


class FromDense(Donor):
    """The blocks of a dense model of the kind that the mixture was made from."""

    def __init__(self, checkpoint: SparseCheckpoint, expert: Expert, source: Source, base: Source | None) -> None:
        """Raises an error of ours if they do not fit."""
        if checkpoint.container is None:
            raise UnsupportedModelError(
                f"experts of a {checkpoint.config.get('model_type')} cannot be made of a dense model, as `build` makes "
                f"no such mixtures; give copy_of, the number of an expert to start from"
            )
        if expert.delta_scale != 1 and base is None:
            raise RecipeError(f"delta_scale={expert.delta_scale} needs the base model; pass base")
        self._checkpoint, self._container = checkpoint, checkpoint.container
        self._expect(source)
        self._blocks = Blocks([base or source, source], self._container.dense_matrices)
        part = Part(
            source=1,
            scale=expert.residual_scale,
            delta_scale=expert.delta_scale,
            noise_scale=expert.noise_scale,
            seed=f"added {expert.name}",
        )
        self._block = Block((part,))

    def one(self, block: SparseBlock, place: str) -> Tensor:
        """The matrix of its role."""
        (matrix,) = self._roles(block)[place.format(0)]
        return self._matrix(block, matrix)

    def part(self, block: SparseBlock, name: str) -> Tensor:
        """The matrices of its roles, one after another."""
        return torch.cat([self._matrix(block, matrix) for matrix in self._roles(block)[name]])

    def _roles(self, block: SparseBlock) -> dict[str, tuple[Matrix, ...]]:
        return dict(self._container.experts(block.layer, 1))

    def _matrix(self, block: SparseBlock, matrix: Matrix) -> Tensor:
        width = width_of(self._checkpoint, block, self._container)
        return self._blocks.matrix(self._block, block.layer, matrix.role, width)

    def _expect(self, source: Source) -> None:
        if source.config.model_type not in self._container.dense:
            raise RecipeError(
                f"{source.name} is a {source.config.model_type}; experts of a {self._container.name} are made of "
                f"{' or '.join(self._container.dense)}"
            )
        for block in self._checkpoint.blocks:
            name = self._container.dense_matrices(block.layer)["gate"]
            width = width_of(self._checkpoint, block, self._container)
            found = source.tensors.get(name)
            if found is None or found.shape[1] != self._checkpoint.hidden_size or found.shape[0] > width:
                raise RecipeError(
                    f"{source.name} has {list(found.shape) if found else 'no tensor'} as {name}, and experts of the "
                    f"mixture have room for {[width, self._checkpoint.hidden_size]}; take a model of the same size"
                )


def width_of(checkpoint: SparseCheckpoint, block: SparseBlock, container: Container) -> int:
    """Channels of an expert."""
    for name, matrices in container.experts(block.layer, checkpoint.num_experts).items():
        if matrices[0].role == "down":
            return checkpoint.tensors[name].shape[-1]
    raise AssertionError("every container has a down projection")
