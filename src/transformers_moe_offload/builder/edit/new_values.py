"""New values of tensors, when an expert is added, dropped or replaced.

A new expert's weights come from a donor: a dense model, or another expert of the same mixture. Its row in a router is
given, another expert's with noise, the mean of all, or computed anew.
"""

# E experts, H hidden size, I width of an expert

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from transformers_moe_offload.builder.edit.expert_tensors import SparseBlock, SparseCheckpoint
from transformers_moe_offload.builder.gates import RidgeStatistics, add_expert_gate
from transformers_moe_offload.builder.recipe import Expert
from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.builder.targets import Matrix
from transformers_moe_offload.builder.texts.tokenizer import read_tokenizer
from transformers_moe_offload.builder.weights.blocks import Block, Blocks, Part, generator_for
from transformers_moe_offload.errors import RecipeError, UnsupportedModelError
from transformers_moe_offload.tensor_files.reading import read_stored

Row = str | int | Mapping[int, Tensor]
"""`mean`, the number of an expert whose rows are copied, or rows (H,) by layer."""


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
        self._block = Block((Part.of(expert, 1, f"added {expert.name}"),))

    def one(self, block: SparseBlock, place: str) -> Tensor:
        """The matrix of its role."""
        (matrix,) = self._container.experts(block.layer, 1)[place.format(0)]
        return self._matrix(block, matrix)

    def part(self, block: SparseBlock, name: str) -> Tensor:
        """The matrices of its roles, one after another."""
        return torch.cat([self._matrix(block, matrix) for matrix in self._container.experts(block.layer, 1)[name]])

    def _matrix(self, block: SparseBlock, matrix: Matrix) -> Tensor:
        return self._blocks.matrix(self._block, block.layer, matrix.role, self._checkpoint.width_of(block))

    def _expect(self, source: Source) -> None:
        if source.config.model_type not in self._container.dense:
            raise RecipeError(
                f"{source.name} is a {source.config.model_type}; experts of a {self._container.name} are made of "
                f"{' or '.join(self._container.dense)}"
            )
        for block in self._checkpoint.blocks:
            name = self._container.dense_matrices(block.layer)["gate"]
            width = self._checkpoint.width_of(block)
            found = source.tensors.get(name)
            if found is None or found.shape[1] != self._checkpoint.hidden_size or found.shape[0] > width:
                raise RecipeError(
                    f"{source.name} has {list(found.shape) if found else 'no tensor'} as {name}, and experts of the "
                    f"mixture have room for {[width, self._checkpoint.hidden_size]}; take a model of the same size"
                )


def expect_row(row: Row, checkpoint: SparseCheckpoint) -> None:
    """Raise `RecipeError` unless `row` fits this mixture."""
    if isinstance(row, Mapping):
        for block in checkpoint.blocks:
            found = row.get(block.layer)
            if found is None or tuple(found.shape) != (checkpoint.hidden_size,):
                raise RecipeError(
                    f"gate has {'no row' if found is None else list(found.shape)} for layer {block.layer}, where the "
                    f"router's rows have [{checkpoint.hidden_size}]"
                )
    elif isinstance(row, int):
        expect_number(row, checkpoint, "gate")
    elif row != "mean":
        raise RecipeError(f"gate={row!r} is neither 'mean', nor the number of an expert, nor rows by layer")


def expect_number(number: int, checkpoint: SparseCheckpoint, what: str) -> None:
    """Raise `RecipeError` unless there is such an expert."""
    if not 0 <= number < checkpoint.num_experts:
        there = "is 1 expert" if checkpoint.num_experts == 1 else f"are {checkpoint.num_experts} experts"
        raise RecipeError(f"{what}={number}, but there {there}, counted from 0")


def row_of(row: Row, checkpoint: SparseCheckpoint, block: SparseBlock, noise_scale: float, seed: int) -> Tensor:
    """The row (H,) float32 of one layer; noise is relative to the size of a row's elements."""
    if isinstance(row, Mapping):
        return row[block.layer].float()
    rows = read_stored(checkpoint.tensors[block.router]).float()
    made = rows.mean(0) if isinstance(row, str) else rows[row].clone()
    if noise_scale:
        noise = torch.randn(made.shape, generator=generator_for(seed, block.layer, "row"))
        made += noise_scale * rows.pow(2).mean().sqrt() * noise
    return made


def ridge_rows(
    checkpoint: SparseCheckpoint, expert: Expert, base: Source, statistics: Path, path: Path, device: str
) -> Callable[[SparseBlock], Tensor]:
    """All rows, computed with the new expert's texts beside the others'."""
    container = checkpoint.container
    if container is None:
        raise RecipeError(f"{statistics} exists, but build_moe does not build this kind of mixture; give gate")
    ffn = {block.layer: container.ffn(block.layer) for block in checkpoint.blocks}
    tokenizer = read_tokenizer(checkpoint.folder, checkpoint.folder.name)
    gates = add_expert_gate(RidgeStatistics(statistics), expert, base, tokenizer, ffn, path, device=device)
    return lambda block: gates.rows[block.layer]


def with_row(checkpoint: SparseCheckpoint, row: Row, noise_scale: float, seed: int, block: SparseBlock) -> Tensor:
    """A router with one row more: (E + 1, H)."""
    rows = read_stored(checkpoint.tensors[block.router])
    return torch.cat([rows, row_of(row, checkpoint, block, noise_scale, seed)[None]])


def grown(checkpoint: SparseCheckpoint, donor: Donor, block: SparseBlock, name: str) -> Tensor:
    """A tensor of all experts with the new one's part: the others' mean, where a dense model has no such tensor."""
    old, axis = read_stored(checkpoint.tensors[name]), block.stacked[name]
    is_matrix = len(old.shape) > 2 or isinstance(donor, Copied)
    new = donor.part(block, name) if is_matrix else old.float().mean(axis)
    return torch.cat([old, new.to(old.dtype).unsqueeze(axis)], axis)


def without(checkpoint: SparseCheckpoint, name: str, axis: int, number: int) -> Tensor:
    """A tensor of all experts without one of them."""
    tensor = read_stored(checkpoint.tensors[name])
    kept = [position for position in range(tensor.shape[axis]) if position != number]
    return tensor.index_select(axis, torch.tensor(kept))


def exchanged(checkpoint: SparseCheckpoint, name: str, axis: int, number: int, value: Callable[[], Tensor]) -> Tensor:
    """A tensor of all experts in which one has another value."""
    tensor = read_stored(checkpoint.tensors[name]).clone()
    tensor.select(axis, number).copy_(value())
    return tensor
