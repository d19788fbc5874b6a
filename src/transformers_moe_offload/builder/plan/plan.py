"""Decide what is written: the container, its config, every tensor of the checkpoint and where each comes from.

Reads configs and headers only, and raises `RecipeError` for whatever cannot be built, before anything is written.
`reader.py` fetches what is planned here, `write.py` writes it.
"""

# E experts, H hidden size, I width of an expert

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from transformers_moe_offload.builder.licences import Verdict, judged
from transformers_moe_offload.builder.plan.compatibility import compare, expect_fitting
from transformers_moe_offload.builder.plan.mixture import Mixture, expect_possible, mixture_of
from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sources import Ancestor, Source
from transformers_moe_offload.builder.sources.model_class import saved_tensors
from transformers_moe_offload.builder.targets import Container, Matrix, MoeShape, candidates
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.expert import ITEMSIZE, FieldSpec


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
            tensors, reason = _tensors(container, shape, saved_tensors(built, dtype), stems[0])
        if reason is None:
            return BuildPlan(
                recipe,
                container,
                _named(built, dtype),
                shape,
                dtype,
                replace(fitting, names=_names(fitting, sources)),
                tuple(sources),
                tuple(stems),
                tuple(tensors),
                _parameters(tensors, shape),
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


def _named(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """The config with the class that it belongs to, as `save_pretrained` writes it."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.dtype = dtype
    return config


def _tensors(
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
        return [], f"it has no place for {_few(sorted(unread))} of the dense model"
    if missing or odd:
        return [], f"it expects {_few(missing or odd)}, which the dense model does not have"
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


def _parameters(tensors: Sequence[PlannedTensor], shape: MoeShape) -> Parameters:
    counts = dict.fromkeys(("stem", "experts", "routers", "shared"), 0)
    for tensor in tensors:
        counts[_kind(tensor)] += prod(tensor.spec.shape)
    per_token = counts["experts"] * shape.experts_per_token // shape.num_experts
    return Parameters(**counts, active=counts["stem"] + counts["routers"] + counts["shared"] + per_token)


def _kind(tensor: PlannedTensor) -> str:
    piece = tensor.pieces[0]
    if isinstance(piece, FromBlock):
        return "shared" if piece.matrix.expert is None else "experts"
    return "stem" if isinstance(piece, FromStem) else "routers"


def _layer_of(name: str) -> int:
    """The decoder layer that a tensor belongs to; -1 for tensors outside of layers, which come first."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
