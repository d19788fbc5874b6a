"""Decide what is written: the container, its config, every tensor of the checkpoint and where each comes from.

Reads configs and headers only, and raises `RecipeError` for whatever cannot be built, before anything is written.
`weights` fetches what is planned here, `writing` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from transformers_moe_offload.builder.licences import Verdict, judged
from transformers_moe_offload.builder.plan.compatibility import compare, expect_fitting
from transformers_moe_offload.builder.plan.mixture import Mixture, expect_possible, mixture_of
from transformers_moe_offload.builder.plan.tensors import (
    FromStem,
    Parameters,
    PlannedTensor,
    parameters_of,
    planned_tensors,
)
from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor, Source
from transformers_moe_offload.builder.sources.model_class import saved_tensors
from transformers_moe_offload.builder.targets import Container, MoeShape, candidates
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.expert import ITEMSIZE


@dataclass(frozen=True)
class BuildPlan:
    """A mixture to be built: everything that follows from a recipe and its models."""

    recipe: MoeRecipe
    container: Container
    config: PreTrainedConfig
    """The mixture's config."""
    shape: MoeShape
    dtype: torch.dtype
    mixture: Mixture
    sources: tuple[Source, ...]
    """The models that experts are made of, in the order of `mixture.origins_of`; the first is the base model."""
    stems: tuple[Source, ...]
    """The models that everything else is made of: one model, or the base model and those that are merged into it."""
    tensors: tuple[PlannedTensor, ...]
    """In the order in which they are written: layer by layer, the matrices of an expert side by side."""
    parameters: Parameters
    warnings: tuple[str, ...]
    licence: Verdict = field(default_factory=lambda: judged(()))
    """The mixture's licence, by its sources' cards."""
    similarity: Mapping[str, float] = field(default_factory=dict)
    """Cosine of each source's blocks with the base model's, the least of three layers; `checks/similarity.py`."""

    @property
    def base(self) -> Source:
        """The dense model that the mixture is made around."""
        return self.sources[0]

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """Every checkpoint that something is taken from, once."""
        return tuple(dict.fromkeys(one for source in (*self.sources, *self.stems) for one in source.ancestors))

    @property
    def stem_names(self) -> tuple[str, ...]:
        """Names of the dense model's tensors that belong to no expert."""
        return tuple(piece.name for tensor in self.tensors for piece in tensor.pieces if isinstance(piece, FromStem))

    @property
    def read_of(self) -> tuple[tuple[Source, tuple[str, ...]], ...]:
        """The tensors that are read of each model: all of models for the stem, else the blocks that become experts."""
        blocks = tuple(name for layer in self.shape.layers for name in self.container.dense_matrices(layer).values())
        whole = [(source, tuple(source.tensors)) for source in (self.base, *self.stems)]
        return (*whole, *((source, blocks) for source in self.sources[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @property
    def ffn(self) -> dict[int, str]:
        """By layer, the path of the dense block that experts replace."""
        return {layer: self.container.ffn(layer) for layer in self.shape.layers}


def plan_build(recipe: MoeRecipe, sources: Sequence[Source], stems: Sequence[Source]) -> BuildPlan:
    """The plan for a recipe, given its opened models."""
    base, config = sources[0], sources[0].config
    expect_possible(recipe, _widest(config))
    mixture = mixture_of(recipe)
    num_layers = config.num_hidden_layers
    layers = recipe.layers or tuple(range(num_layers))
    if layers[-1] >= num_layers:
        raise RecipeError(
            f"layers names layer {layers[-1]}, but {base.name} has {num_layers}, counted from 0; leave it out"
        )
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else _narrowest(base)
    refusals = []
    for container in candidates(recipe.container, config):
        reason = container.refusal(config)
        if reason is None:
            names = container.dense_matrices
            expect_fitting(sources, layers, names)
            widths = [_width(source, names, layers) for source in sources]
            fitting = mixture.halved_gate() if container.shared_gate_name else mixture
            shape = container.fitted(
                MoeShape(
                    num_experts=len(fitting.experts),
                    experts_per_token=recipe.experts_per_token,
                    width=_aligned(fitting.width(widths)),
                    dense_width=widths[0],
                    num_layers=num_layers,
                    layers=layers,
                    shared_width=fitting.shared_width(widths),
                    is_shared_gated=fitting.is_shared_gated,
                )
            )
            reason = container.shape_refusal(shape)
        if reason is None:
            built = container.config(config, shape)
            tensors, reason = planned_tensors(container, shape, saved_tensors(built, dtype), stems[0])
        if reason is None:
            return BuildPlan(
                recipe,
                container,
                named(built, dtype),
                shape,
                dtype,
                replace(fitting, names=_names(fitting, sources)),
                tuple(sources),
                tuple(stems),
                tuple(tensors),
                parameters_of(tensors, shape),
                tuple(compare(sources, stems)),
            )
        refusals.append(f"{container.name}: {reason}")
    raise RecipeError(f"{base.name} ({config.model_type}) does not fit. {'; '.join(refusals)}")


def _widest(config: PreTrainedConfig) -> int:
    """Channels of a dense model's blocks, by its config, before the container and its names are known."""
    widths = [getattr(config, name, 0) for name in ("intermediate_size", "hidden_size")]
    return max(width for width in widths if isinstance(width, int))


def _narrowest(base: Source) -> torch.dtype:
    """The narrowest dtype of the base model's tensors; those that an adapter changes are wider, in float32."""
    name = min((one.dtype for one in base.tensors.values()), key=lambda dtype: ITEMSIZE[dtype])
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _width(source: Source, names: Callable[[int], Mapping[str, str]], layers: Sequence[int]) -> int:
    return max(source.tensors[names(layer)["gate"]].shape[0] for layer in layers)


def _names(mixture: Mixture, sources: Sequence[Source]) -> tuple[str, ...]:
    """The experts' names: those in the recipe, else their sources' names, which contain no paths on this machine."""
    first = (block.parts[0].source for block in mixture.experts)
    return tuple(name or sources[source].name for name, source in zip(mixture.names, first, strict=True))


def _aligned(width: int) -> int:
    """The next multiple of 8: Transformers' grouped product of experts needs rows of whole 16 bytes; dense models do
    not."""
    return -(-width // 8) * 8


def named(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """The config with the class that it belongs to, as `save_pretrained` writes it."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.dtype = dtype
    return config
