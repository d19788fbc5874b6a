"""Merge the stem: one tensor of several models that were tuned from one base, by averaging, TIES or DARE.

Each method takes the differences to the base, combines them and adds the result to the base. It computes in float32,
some elements at a time: beside the given tensors and the result, memory does not grow with their size. `plan` says
which models are merged.
"""

# M models beside the base, N elements of one tensor

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from transformers_moe_offload.builder.recipe import Stem
from transformers_moe_offload.builder.weights.blocks import generator_for
from transformers_moe_offload.errors import RecipeError

_BLOCK = 2**22
"""Elements at a time: 16 MiB of each model in float32."""

_MAGNITUDE_BITS = 31
_COARSE_BITS = 16
_FINE_BITS = _MAGNITUDE_BITS - _COARSE_BITS


def merged(stem: Stem, base: Tensor, others: Sequence[Tensor], name: str) -> Tensor:
    """The tensor `name` of a merged model: all of one shape -> that shape, in the base's dtype.

    What DARE draws depends on the seed, the name and the model's number alone, so the order in which tensors are merged
    and the files that they are in do not matter.
    """
    if stem.method == "base" or not others or not base.numel():
        return base
    for number, other in enumerate(others, 1):
        if other.shape != base.shape:
            raise RecipeError(
                f"stem: {name} is {list(base.shape)} in the base model and {list(other.shape)} in model {number} of "
                f"those that are merged; models have to be of one size for that, so set stem.method to base"
            )
    if not base.is_floating_point():
        if all(torch.equal(base, other) for other in others):
            return base
        raise RecipeError(f"stem: {name} holds {base.dtype} that differ between models; set stem.method to base")
    combine = _METHODS[stem.method](stem, base, others, name)
    result = torch.empty(base.shape, dtype=base.dtype)
    out = result.view(-1)
    for block, plain, differences in _blocks(base, others):
        out[block] = torch.add(plain, combine(differences), alpha=stem.weight).to(base.dtype)
    return result


Combine = Callable[[Tensor], Tensor]
"""Some elements of all differences, (M, n) float32, one block after another -> what is added to the base's, (n,)."""


def _average(stem: Stem, base: Tensor, others: Sequence[Tensor], name: str) -> Combine:
    return lambda differences: differences.mean(0)


def _ties(stem: Stem, base: Tensor, others: Sequence[Tensor], name: str) -> Combine:
    """TIES (arXiv 2306.01708, Algorithm 1): trim, elect signs, average those that agree.

    The paper trims a model's difference as a whole; here it is trimmed tensor by tensor, as PEFT (0.21) and mergekit
    (0.1.5) do.
    """
    kept = max(1, int(stem.density * base.numel()))
    least = torch.stack([_kth_largest(base, other, kept) for other in others])

    def combine(differences: Tensor) -> Tensor:
        trimmed = torch.where(differences.abs() >= least[:, None], differences, 0)
        agrees = trimmed.sign() == trimmed.sum(0).sign()
        agreed = torch.where(agrees, trimmed, 0)
        return agreed.sum(0) / (agrees & (trimmed != 0)).sum(0).clamp(min=1)

    return combine


def _dare(stem: Stem, base: Tensor, others: Sequence[Tensor], name: str) -> Combine:
    """DARE (arXiv 2311.03099, section 3.1): drop elements at random, rescale the others, and average."""
    generators = [generator_for(stem.seed, name, number) for number in range(len(others))]

    def combine(differences: Tensor) -> Tensor:
        width = differences.shape[1]
        is_kept = torch.stack([torch.rand(width, generator=generator) < stem.density for generator in generators])
        return (torch.where(is_kept, differences, 0) / stem.density).mean(0)

    return combine


_METHODS = {"average": _average, "ties": _ties, "dare": _dare}


def _blocks(base: Tensor, others: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The slice of some elements, the base's values, (n,) float32, and the differences to these, (M, n) float32."""
    flat = base.reshape(-1)
    flat_others = [other.reshape(-1) for other in others]
    for start in range(0, flat.numel(), _BLOCK):
        block = slice(start, min(start + _BLOCK, flat.numel()))
        plain = flat[block].float()
        yield block, plain, torch.stack([other[block].float() - plain for other in flat_others])


def _kth_largest(base: Tensor, other: Tensor, k: int) -> Tensor:
    """The k-th largest magnitude of a difference, () float32; k counts from 1.

    By counting: the bits of non-negative floats, read as integers, have the floats' order (IEEE 754), so a histogram of
    the upper half and one of the lower half find it, without an index for every element as `torch.topk` makes one.
    """
    coarse, above = _descend(_bits(base, other), _FINE_BITS, 2**_COARSE_BITS, k)
    matching = (bits[(bits >> _FINE_BITS) == coarse] & (2**_FINE_BITS - 1) for bits in _bits(base, other))
    fine, _ = _descend(matching, 0, 2**_FINE_BITS, k - above)
    return torch.tensor((coarse << _FINE_BITS) | fine, dtype=torch.int32).view(torch.float32)


def _descend(bits: Iterator[Tensor], shift: int, num_bins: int, k: int) -> tuple[int, int]:
    """The bin of the k-th largest value, and how many values are in the bins above it."""
    counts = torch.zeros(num_bins, dtype=torch.int64)
    for block in bits:
        counts += torch.bincount(block >> shift, minlength=num_bins)
    from_above = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_above, k))
    return num_bins - 1 - position, int(from_above[position - 1]) if position else 0


def _bits(base: Tensor, other: Tensor) -> Iterator[Tensor]:
    """The magnitudes of a difference as integers in the same order, (n,) int32."""
    for _, _, difference in _blocks(base, [other]):
        yield difference[0].abs().view(torch.int32)
