"""How similar experts are to the base model: fine-tunes of one model are nearly parallel, unrelated ones orthogonal.

The cosine of two models' matrices, seen as vectors, is above 0.9 for a fine-tune of one from the other and, within
1/sqrt(size), 0 for models that were trained apart. In the second case the attention of one does not work with the
blocks of the other.
"""

from __future__ import annotations

from dataclasses import replace

from transformers_moe_offload.builder.plan import BuildPlan
from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.errors import RecipeError

RELATED = 0.5
"""Cosine below which two models count as unrelated: far from both 0.9 and 0."""

_ROWS = 256
_SMALLEST = 1e-30  # so that matrices of zeros count as unrelated, without a division by zero


def compared(plan: BuildPlan) -> BuildPlan:
    """The plan with its `similarity`, and warnings about unrelated sources, as `checks.similarity` says.

    The least cosine of each source's matrices with the base model's, over the first, middle and last layer; sources
    whose blocks are of another width cannot be compared and are left out.
    """
    layers, level = plan.shape.layers, plan.recipe.checks.similarity
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    names = [plan.container.dense_matrices(layer)["up"] for layer in chosen]
    found = {
        source.name: min(_cosine(plan.base, source, name) for name in names)
        for source in plan.sources[1:]
        if all(source.tensors[name].shape == plan.base.tensors[name].shape for name in names)
    }
    messages = [
        f"{name} has nothing in common with the base model {plan.base.name} (cosine of their matrices {cosine:.2f}, "
        f"fine-tunes have more than 0.9); its blocks were not trained with the attention around them"
        for name, cosine in found.items()
        if cosine < RELATED
    ]
    if messages and level == "error":
        raise RecipeError(f"{messages[0]}; take experts from fine-tunes of one model, or set checks.similarity to warn")
    warnings = plan.warnings if level == "off" else (*plan.warnings, *messages)
    return replace(plan, similarity=found, warnings=warnings)


def _cosine(base: Source, source: Source, name: str) -> float:
    """Cosine of two models' versions of a matrix; only some rows are in float32 at a time."""
    product = first_norm = second_norm = 0.0
    for rows in zip(base.read(name).split(_ROWS), source.read(name).split(_ROWS), strict=True):
        first, second = (one.float().flatten() for one in rows)
        product += float(first @ second)
        first_norm += float(first @ first)
        second_norm += float(second @ second)
    return product / max((first_norm * second_norm) ** 0.5, _SMALLEST)
