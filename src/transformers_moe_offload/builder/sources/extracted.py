"""A fine-tuned model as the base model with an adapter of low rank: the best approximation of the difference, by
truncated singular value decomposition (Eckart and Young, 1936).

Linear layers only, as in LoRA: embeddings, head, norms and biases are the base model's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from transformers_moe_offload.builder.sources.base import DerivedSource, Source
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.expert import FieldSpec

_EXACT_UP_TO = 1024
"""Smaller dimension of a matrix up to which it is decomposed as a whole; beyond, by random projection (Halko,
Martinsson and Tropp, arXiv 0909.4061), whose cost grows with the rank."""

_OVERSAMPLING, _ITERATIONS = 8, 4  # as Halko et al. advise for spectra that fall slowly, as those of fine-tunes do


class ExtractedSource(DerivedSource):
    """A fine-tuned model, reduced to a LoRA of some rank on the base model."""

    def __init__(self, tuned: Source, base: Source, rank: int) -> None:
        self._tuned, self._rank = tuned, rank
        if tuned.config.model_type != base.config.model_type or {
            name: one.shape for name, one in tuned.tensors.items()
        } != {name: one.shape for name, one in base.tensors.items()}:
            raise RecipeError(
                f"extract_rank={rank}: {tuned.name} and {base.name} differ in kind or size, so their difference is not "
                f"defined; leave extract_rank out, or give the model that {tuned.name} was tuned from as base_model"
            )

        super().__init__(base, {name for name, one in base.tensors.items() if _is_linear(one)})
        self.name, self.config, self.companions = tuned.name, tuned.config, tuned.companions
        self.ancestors = tuple(dict.fromkeys((*tuned.ancestors, *base.ancestors)))

    def read(self, name: str) -> Tensor:
        """One tensor of the base model, plus the approximated difference."""
        tensor = self._base.read(name)
        if name not in self._computed:
            return tensor
        tensor = tensor.float()
        return tensor + _truncated(self._tuned.read(name).float() - tensor, self._rank)

    def bring(self, names: Iterable[str]) -> None:
        """Download both models' files, the fine-tuned one's for linear layers only."""
        names = list(names)
        self._base.bring(names)
        self._tuned.bring(name for name in names if name in self._computed)


def _is_linear(one: FieldSpec) -> bool:
    return len(one.shape) == 2 and not any(part in one.name for part in ("embed", "lm_head"))


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank: (O, I) float32 -> (O, I) float32."""
    if min(matrix.shape) <= _EXACT_UP_TO:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # so that the same sources give the same bytes
            left, values, right = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLING, niter=_ITERATIONS)
    return (left[:, :rank] * values[:rank]) @ right[:, :rank].T
