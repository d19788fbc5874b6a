"""One expert's arithmetic, as the flags of Transformers' experts decorator describe it.

The activation, and the norm after the expert where there is one, are called on the experts module itself
(`use_experts_implementation` in `transformers/integrations/moe.py`, 5.23), so that clamped, soft-capped and other
gates need no code here.
"""

# N rows, H hidden, I intermediate

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload import kernels
from transformers_moe_offload.formats.base import Codec
from transformers_moe_offload.kernels import Activations
from transformers_moe_offload.kernels.packed import PackedMatrix

ExpertWeights = Mapping[str, Tensor | PackedMatrix]
"""One expert's fields by name: tensors, or matrices in low bits, which are (out, in) whatever `is_transposed` says."""


@dataclass(frozen=True)
class ExpertMlp:
    """How a class of experts computes."""

    has_gate: bool = True
    """Gate and up projection in one, `gate_up_proj`, then the module's `_apply_gate`; else `up_proj` and `act_fn`."""
    has_bias: bool = False
    is_transposed: bool = False
    """Weights are stored (in, out) instead of (out, in)."""
    has_post_expert_norm: bool = False
    activations: Activations = "exact"
    """What products with matrices in low bits may do to their inputs."""

    def __call__(self, experts: Any, rows: Tensor, weights: ExpertWeights) -> Tensor:
        """rows (N, H), one expert's weights -> (N, H), not yet multiplied by the routing weights."""
        return self.through(experts, rows, lambda inputs, name: self.project(inputs, weights, name))

    def through(self, experts: Any, rows: Tensor, project: Callable[[Tensor, str], Tensor]) -> Tensor:
        """The same with products of your own: `project` takes rows (N, in) and the name of a field to (N, out)."""
        hidden = self.activate(experts, project(rows, self.matrices[0]))
        out = project(hidden, "down_proj")
        if self.has_post_expert_norm:
            normalised: Tensor = experts.post_expert_norm(out)
            return normalised
        return out

    def takes_several(self, rows: Tensor, counts: Sequence[int], codecs: Collection[Codec | None]) -> bool:
        """Whether `several` computes experts that are stored in these ways, with so many of the rows each."""
        if self.has_bias or self.has_post_expert_norm:
            return False
        if all(codec is None for codec in codecs):  # weights are used together with rows of their own dtype
            are_few = max(counts) <= kernels.dense.FEW_ROWS
            return are_few and not self.is_transposed and kernels.dense.reads_fast(rows)
        are_packed = all(codec is not None and codec.is_packed for codec in codecs)
        return are_packed and kernels.can_multiply_each(rows)

    def several(
        self, experts: Any, rows: Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights]
    ) -> Sequence[Tensor]:
        """rows (N, H), as many as `counts` says for each of some experts -> those of each, (n, H), as if alone.

        In few large steps, which cost less than many small ones.
        """
        hidden = self.activate(experts, self._project_several(rows, counts, weights, self.matrices[0]))
        return torch.split(self._project_several(hidden, counts, weights, "down_proj"), list(counts))

    @property
    def matrices(self) -> tuple[str, str]:
        """The fields that rows are multiplied with, in this order."""
        return ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of an expert."""
        return (*self.matrices, *(f"{name}_bias" for name in self.matrices if self.has_bias))

    def activate(self, experts: Any, hidden: Tensor) -> Tensor:
        """hidden (N, 2 * I) or (N, I), products with the first matrix -> (N, I), as the module has it."""
        activated: Tensor = experts._apply_gate(hidden) if self.has_gate else experts.act_fn(hidden)
        return activated

    def _project_several(
        self, rows: Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights], name: str
    ) -> Tensor:
        matrices = [one[name] for one in weights]
        return kernels.linear_each(rows, counts, matrices, activations=self.activations)

    def gradient(self, gradient: Tensor, weights: ExpertWeights, name: str) -> Tensor:
        """The gradient of a product, (N, out) -> that of its rows, (N, in), in the same dtype."""
        matrix = weights[name]
        if isinstance(matrix, PackedMatrix):
            return kernels.linear_transposed(gradient, matrix)
        matrix = matrix.to(gradient.dtype)  # under autocast the product had it in this dtype
        return gradient @ matrix.t() if self.is_transposed else kernels.dense.linear_transposed(gradient, matrix)

    def project(self, rows: Tensor, weights: ExpertWeights, name: str) -> Tensor:
        """rows (N, in) -> (N, out), their product with a field."""
        matrix, bias = weights[name], weights[f"{name}_bias"] if self.has_bias else None
        assert not isinstance(bias, PackedMatrix)
        if isinstance(matrix, PackedMatrix):
            out = kernels.linear(rows, matrix, activations=self.activations)
            return out if bias is None else out + bias
        if bias is not None:
            return torch.addmm(bias, rows, matrix) if self.is_transposed else functional.linear(rows, matrix, bias)
        return kernels.dense.linear(rows, matrix.t() if self.is_transposed else matrix)
