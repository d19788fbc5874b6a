"""Every tensor of a mixture's checkpoint, and what it consists of; numbers of parameters by kind.

`weights/tensor_reader.py` fetches what is planned here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.builder.targets import Container, Matrix, MoeShape
from transformers_moe_offload.builder.targets.base import few
from transformers_moe_offload.expert import FieldSpec


class FromStem(NamedTuple):
    """A tensor of the dense model, or of several merged."""

    name: str


class FromBlock(NamedTuple):
    """A matrix of an expert, or of the shared block."""

    layer: int
    matrix: Matrix


class RouterRows(NamedTuple):
    """A layer's router."""

    layer: int


class SharedGateRow(NamedTuple):
    """The gate of a layer's shared block."""

    layer: int


class Zeros(NamedTuple):
    """Zeros only."""


Piece = FromStem | FromBlock | RouterRows | SharedGateRow | Zeros


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written, and what it consists of, one after another."""

    spec: FieldSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Parameters:
    """How many numbers the mixture has."""

    stem: int
    experts: int
    routers: int
    shared: int
    active: int
    """Those that one token uses, embeddings and head included."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.stem + self.experts + self.routers + self.shared

    @classmethod
    def counted(
        cls, shapes: Iterable[tuple[str, tuple[int, ...]]], experts_per_token: int, num_experts: int
    ) -> Parameters:
        """Given the kind of every tensor, `stem`, `experts`, `routers` or `shared`, and its shape."""
        counts = dict.fromkeys(("stem", "experts", "routers", "shared"), 0)
        for kind, shape in shapes:
            counts[kind] += prod(shape)
        per_token = counts["experts"] * experts_per_token // num_experts
        return cls(**counts, active=counts["stem"] + counts["routers"] + counts["shared"] + per_token)


def planned_tensors(
    container: Container, shape: MoeShape, layout: Mapping[str, FieldSpec], stem: Source
) -> tuple[list[PlannedTensor], str | None]:
    """Every tensor of the layout with its pieces; or why the dense model and the container do not go together.

    Every tensor of the class has to come from somewhere, and every tensor of the dense model has to go somewhere.
    """
    planned: dict[str, tuple[Piece, ...]] = {}
    unread = set(stem.tensors)
    for layer in shape.layers:
        unread -= set(container.dense_matrices(layer).values())
    for name in list(stem.tensors):
        if name in unread and name in layout and layout[name].shape == stem.tensors[name].shape:
            planned[name] = (FromStem(name),)
            unread.discard(name)
    for layer in shape.layers:
        planned |= dict(_block_tensors(container, shape, layer, layout))
    missing = [name for name in layout if name not in planned]
    odd = [name for name in planned if name not in layout]
    if unread:
        return [], f"it has no place for {few(sorted(unread))} of the dense model"
    if missing or odd:
        return [], f"it expects {few(missing or odd)}, which the dense model does not have"
    numbers = {name: number for number, name in enumerate(planned)}
    order = sorted(planned, key=lambda name: (_layer_of(name), numbers[name]))
    return [PlannedTensor(layout[name], planned[name]) for name in order], None


def _block_tensors(
    container: Container, shape: MoeShape, layer: int, layout: Mapping[str, FieldSpec]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """The tensors that a container has in place of a layer's dense block."""
    yield container.router(layer), (RouterRows(layer),)
    for name in container.zeros(layer):
        yield name, (Zeros(),)
    gate = container.shared_gate(layer)
    if gate is not None:
        yield gate, (SharedGateRow(layer) if shape.is_shared_gated else Zeros(),)
    for name, matrices in container.shared(layer).items():
        if shape.shared_width or name in layout:  # some classes have it with a width of 0
            yield name, tuple(FromBlock(layer, matrix) for matrix in matrices) if shape.shared_width else (Zeros(),)
    for name, matrices in container.experts(layer, shape.num_experts).items():
        yield name, tuple(FromBlock(layer, matrix) for matrix in matrices)


def parameters_of(tensors: Sequence[PlannedTensor], shape: MoeShape) -> Parameters:
    """How many numbers the mixture has."""
    shapes = ((_kind(tensor), tensor.spec.shape) for tensor in tensors)
    return Parameters.counted(shapes, shape.experts_per_token, shape.num_experts)


def _kind(tensor: PlannedTensor) -> str:
    piece = tensor.pieces[0]
    if isinstance(piece, FromBlock):
        return "shared" if piece.matrix.expert is None else "experts"
    return "stem" if isinstance(piece, FromStem) else "routers"


def _layer_of(name: str) -> int:
    """The decoder layer that a tensor belongs to; -1 for tensors outside of layers, which come first."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1
