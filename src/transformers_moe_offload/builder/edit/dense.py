"""`merge_to_dense`: one expert, or the average of all, as the feed-forward block of a dense model."""

# I width of a block

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from transformers_moe_offload.builder.edit.expert_tensors import SparseCheckpoint
from transformers_moe_offload.builder.edit.new_values import expect_number
from transformers_moe_offload.builder.plan.plan import named
from transformers_moe_offload.builder.sources.model_class import saved_tensors
from transformers_moe_offload.builder.targets import Container, Matrix
from transformers_moe_offload.builder.targets.base import carried
from transformers_moe_offload.builder.writing.folder import MARKS
from transformers_moe_offload.builder.writing.weight_files import write_checkpoint
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import RecipeError, UnsupportedModelError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hub.fetch import companions_in, published
from transformers_moe_offload.output.place import place_for
from transformers_moe_offload.output.shards import Content
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.tensor_files.writer import write_bytes, write_text


def merge_to_dense(
    folder: str | Path, out: str | Path, *, experts: int | str = "average", family: str | None = None
) -> Path:
    """Make a dense model of a mixture; returns where it is.

    Exact where the experts are equal; otherwise the model of averaged weights differs from the mixture.

    Args:
        folder: a mixture of a kind that `build_moe` makes.
        out: where to write the dense model.
        experts: the `average` of all, or the number of the one to take.
        family: model type of the dense model, where the mixture can be made of several.
    """
    checkpoint = SparseCheckpoint.of(Path(folder))
    container = checkpoint.container
    if container is None:
        raise UnsupportedModelError(
            f"a {checkpoint.config.get('model_type')} has no dense model that it was made of; only mixtures as `build` "
            f"makes them can be merged"
        )
    if isinstance(experts, int):
        expect_number(experts, checkpoint, "experts")
        chosen: Sequence[int] = [experts]
    elif experts == "average":
        chosen = range(checkpoint.num_experts)
    else:
        raise RecipeError(f"experts={experts!r} is neither 'average' nor the number of an expert")
    config, layout = _dense(checkpoint, container, family)
    contents = [Content((spec,), partial(_tensor, checkpoint, container, spec, chosen)) for spec in layout.values()]
    recipe = {"merged": checkpoint.folder.resolve().name, "experts": experts}
    with place_for(Path(out), recipe, MARKS) as place:
        write_checkpoint(place, contents, lambda nbytes: None)
        for file in companions_in(checkpoint.folder):
            write_bytes(place / file.name, published(file))
        write_text(place / CONFIG_NAME, config.to_json_string())
    return Path(out)


def _dense(
    checkpoint: SparseCheckpoint, container: Container, family: str | None
) -> tuple[PreTrainedConfig, Mapping[str, FieldSpec]]:
    """The config of the dense model, and its tensors; the first family whose stem the mixture has."""
    if family is not None and family not in container.dense:
        raise RecipeError(f"family={family!r}, but a {container.name} is made of {' or '.join(container.dense)}")
    shared = [name for name in container.shared(checkpoint.blocks[0].layer) if name in checkpoint.tensors]
    if any(min(checkpoint.tensors[name].shape) for name in shared):  # some classes have it with a width of 0
        raise UnsupportedModelError(
            f"{checkpoint.folder} has a block that every token visits, which a dense model has no place for"
        )
    ours = CONFIG_MAPPING[container.name](**{k: v for k, v in checkpoint.config.items() if k != "model_type"})
    reasons = []
    for name in [family] if family is not None else container.dense:
        cls = CONFIG_MAPPING[name]
        dtype = torch_dtype(checkpoint.tensors[checkpoint.blocks[0].router].dtype)
        config = named(cls(**{**carried(ours, cls), "intermediate_size": _width(checkpoint, container)}), dtype)
        layout = saved_tensors(config, dtype)
        lacking = _lacking(checkpoint, container, layout)
        if not lacking:
            return config, layout
        reasons.append(f"{name} has {', '.join(lacking[:3])}")
    raise UnsupportedModelError(f"{checkpoint.folder} cannot become a dense model: {'; '.join(reasons)}")


def _lacking(checkpoint: SparseCheckpoint, container: Container, layout: Mapping[str, FieldSpec]) -> list[str]:
    """Tensors that only one of the two has, the mixture or the dense model."""
    sparse = {block.layer for block in checkpoint.blocks}
    made = {name for layer in sparse for name in container.dense_matrices(layer).values()}
    used = {name for block in checkpoint.blocks for name in (*block.experts, *block.stacked)}
    kept = {name for name in checkpoint.tensors if name not in used}
    zeros = {name for layer in sparse for name in (*container.zeros(layer), *container.shared(layer))}
    gates = {container.shared_gate(layer) for layer in sparse}
    return sorted((layout.keys() - made - kept) | (kept - layout.keys() - zeros - gates))


def _width(checkpoint: SparseCheckpoint, container: Container) -> int:
    """Channels of the widest block."""
    sparse = {block.layer for block in checkpoint.blocks}
    dense = [
        checkpoint.tensors[container.dense_matrices(layer)["gate"]].shape[0]
        for layer in range(int(checkpoint.config["num_hidden_layers"]))
        if layer not in sparse
    ]
    return max([*map(checkpoint.width_of, checkpoint.blocks), *dense])


def _tensor(
    checkpoint: SparseCheckpoint, container: Container, spec: FieldSpec, chosen: Sequence[int]
) -> dict[str, Tensor]:
    """A tensor of the dense model, in its dtype."""
    for block in checkpoint.blocks:
        for role, name in container.dense_matrices(block.layer).items():
            if name == spec.name:
                matrices = (_matrix(checkpoint, container, block.layer, Matrix(one, role)).float() for one in chosen)
                return {spec.name: _padded(reduce(torch.add, matrices) / len(chosen), spec)}
    return {spec.name: _padded(read_stored(checkpoint.tensors[spec.name]), spec)}


def _matrix(checkpoint: SparseCheckpoint, container: Container, layer: int, wanted: Matrix) -> Tensor:
    """One matrix of an expert, wherever it is stored."""
    for name, matrices in container.experts(layer, checkpoint.num_experts).items():
        if wanted in matrices:
            tensor = read_stored(checkpoint.tensors[name])
            if len(matrices) == 1:
                return tensor
            roles = [matrix.role for matrix in matrices if matrix.expert == wanted.expert]
            assert wanted.expert is not None
            return tensor[wanted.expert].chunk(len(roles))[roles.index(wanted.role)]
    raise AssertionError(f"no tensor has {wanted}")


def _padded(tensor: Tensor, spec: FieldSpec) -> Tensor:
    """A tensor, widened by channels of zeros, which change nothing."""
    padding: list[Any] = []
    for size, wanted in zip(reversed(tensor.shape), reversed(spec.shape), strict=True):
        padding += [0, wanted - size]
    return torch.nn.functional.pad(tensor, padding).to(torch_dtype(spec.dtype))
