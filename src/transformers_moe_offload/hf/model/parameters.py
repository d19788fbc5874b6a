"""The experts of a layer in the form of the plain model's parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.layer_source import LayerSource


def parameters_of(layer: SparseLayer, source: LayerSource) -> dict[str, Tensor]:
    """All experts of a layer, read and decoded: path in the module -> tensor on the layer's device.

    Rows behind the last expert, which no forward reads, are zero if the checkpoint does not store them.
    """
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, Tensor] = {}
    for field, spec in zip(layer.fields, source.spec.fields, strict=True):
        if field.is_stacked:
            assert field.num_entries is not None
            shape = (field.num_entries, *field.shape)
            stack = stacks[field.name] = torch.zeros(shape, dtype=torch_dtype(spec.dtype), device=layer.device)
            for row, entry in zip(stack[layer.num_experts :], source.spare.get(field.name, ()), strict=False):
                row.copy_(entry.read(field.shape))
            tensors[field.paths[0]] = stack.flatten(0, 1) if field.is_flattened else stack
    for expert in range(layer.num_experts):
        weights = source.read(expert)
        for field in layer.fields:
            if field.is_stacked:
                stacks[field.name][expert].copy_(weights[field.name])
            else:
                tensors[field.paths[expert]] = weights[field.name].to(layer.device, copy=True)
    return tensors
