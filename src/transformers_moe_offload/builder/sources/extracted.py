"""A fine-tuned model as the base model with an adapter of low rank: the best approximation of the difference, by
truncated singular value decomposition (Eckart and Young, 1936).

Linear layers only, as in LoRA: embeddings, head, norms and biases are the base model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from transformers_moe_offload.builder.sources.base import Ancestor, DerivedSource, Source
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.tensor_files.index import StoredTensor

_EXACT_UP_TO = 1024
"""Smaller dimension of a matrix up to which it is decomposed as a whole; beyond, by random projection (Halko,
Martinsson and Tropp, arXiv 0909.4061), whose cost grows with the rank."""

_OVERSAMPLING, _ITERATIONS = 8, 4  # as Halko et al. advise for spectra that fall slowly, as those of fine-tunes do


class ExtractedSource(DerivedSource):
    """A fine-tuned model, reduced to a LoRA of some rank on the base model."""

    def __init__(self, tuned: Source, base: Source, rank: int) -> None:
        super().__init__(tuned)
        self._tuned, self._base, self._rank = tuned, base, rank
        if tuned.config.model_type != base.config.model_type or {
            name: one.shape for name, one in tuned.tensors.items()
        } != {name: one.shape for name, one in base.tensors.items()}:
            raise RecipeError(
                f"extract_rank={rank}: {tuned.name} and {base.name} differ in kind or size, so their difference is not "
                f"defined; leave extract_rank out, or give the model that {tuned.name} was tuned from as base_model"
            )

    @property
    def name(self) -> str:
        """The fine-tuned model's."""
        return self._tuned.name

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """The fine-tuned model and the base model."""
        return tuple(dict.fromkeys((*self._tuned.ancestors, *self._base.ancestors)))

    @property
    def tensors(self) -> Mapping[str, FieldSpec]:
        """The base model's, linear layers in float32."""
        return {name: one.cast("float32") if _is_linear(one) else one for name, one in self._base.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor of the base model, plus the approximated difference."""
        tensor = self._base.read(name)
        if not _is_linear(self._base.tensors[name]):
            return tensor
        tensor = tensor.float()
        return tensor + _truncated(self._tuned.read(name).float() - tensor, self._rank)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it; linear layers are computed as a whole."""
        if _is_linear(self._base.tensors[name]):
            return self.read(name)[start:stop]
        return self._base.read_rows(name, start, stop)

    def stored(self, name: str) -> StoredTensor | None:
        """The base model's stored tensor; None for linear layers, which are computed."""
        return None if _is_linear(self._base.tensors[name]) else self._base.stored(name)

    def bring(self, names: Iterable[str]) -> None:
        """Download both models' files, the fine-tuned one's for linear layers only."""
        names = list(names)
        self._base.bring(names)
        self._tuned.bring(name for name in names if _is_linear(self._base.tensors[name]))


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
