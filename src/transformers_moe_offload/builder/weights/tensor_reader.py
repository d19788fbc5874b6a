"""Fetch planned tensors: their elements, a piece at a time, in the dtype in which they are written."""

# E experts, H hidden size, I width of an expert

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from transformers_moe_offload.builder.plan import BuildPlan, tensors
from transformers_moe_offload.builder.targets import Matrix
from transformers_moe_offload.builder.weights.blocks import Blocks, Channels
from transformers_moe_offload.builder.weights.stem_merge import merged
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec

_CHUNK_BYTES = 64 * 2**20
"""Larger tensors are copied in parts of this size: an embedding table can be larger than everything else in memory."""


class TensorReader:
    """The sources of a plan, its routers' rows, and the channels of parts."""

    def __init__(
        self,
        plan: BuildPlan,
        rows: Mapping[int, Tensor],
        shared_rows: Mapping[int, Tensor] | None = None,
        channels: Channels | None = None,
    ) -> None:
        """`rows` by layer (E, H), `shared_rows` (1, H)."""
        self.plan = plan
        self.rows = rows
        self.shared_rows = shared_rows or {}
        self.blocks = Blocks(plan.sources, plan.container.dense_matrices, channels)

    def values(self, tensor: tensors.PlannedTensor) -> Iterator[Tensor]:
        """The elements of a tensor, in their order, piece by piece."""
        dtype = torch_dtype(tensor.spec.dtype)
        for piece in tensor.pieces:
            for values in self._values(piece, tensor.spec):
                yield values.to(dtype)

    def matrix(self, layer: int, matrix: Matrix) -> Tensor:
        """A matrix of an expert, or of the shared block, before it is rounded to the dtype of the mixture."""
        shape, mixture = self.plan.shape, self.plan.mixture
        if matrix.expert is not None:
            return self.blocks.matrix(mixture.experts[matrix.expert], layer, matrix.role, shape.width)
        if mixture.shared is not None:
            return self.blocks.matrix(mixture.shared, layer, matrix.role, shape.shared_width)
        hidden, width = self.plan.config.hidden_size, shape.shared_width
        return torch.zeros((hidden, width) if matrix.role == "down" else (width, hidden))

    def stem(self, name: str) -> Tensor:
        """A tensor that is no part of an expert."""
        base, *others = self.plan.stems
        return merged(self.plan.recipe.stem, base.read(name), [other.read(name) for other in others], name)

    def stem_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it."""
        if len(self.plan.stems) == 1:
            return self.plan.stems[0].read_rows(name, start, stop)
        return self.stem(name)[start:stop]

    def _values(self, piece: tensors.Piece, spec: FieldSpec) -> Iterator[Tensor]:
        if isinstance(piece, tensors.FromStem):
            yield from self._stem_values(piece.name, spec)
        elif isinstance(piece, tensors.FromBlock):
            yield self.matrix(piece.layer, piece.matrix)
        elif isinstance(piece, tensors.RouterRows):
            yield self.rows[piece.layer]
        elif isinstance(piece, tensors.SharedGateRow):
            yield self.shared_rows[piece.layer]
        else:
            assert isinstance(piece, tensors.Zeros)
            yield torch.zeros(spec.shape)

    def _stem_values(self, name: str, spec: FieldSpec) -> Iterator[Tensor]:
        """A whole tensor, or some rows at a time if it is large and only copied."""
        if len(self.plan.stems) > 1 or spec.nbytes <= _CHUNK_BYTES or len(spec.shape) < 2:
            yield self.stem(name)
            return
        step = max(1, _CHUNK_BYTES // (spec.nbytes // spec.shape[0]))
        for start in range(0, spec.shape[0], step):
            yield self.stem_rows(name, start, min(start + step, spec.shape[0]))
