"""Which linear layers of attention and dense MLPs have their weights in low bits, and how they are swapped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from transformers_moe_offload.config import HqqFormat
from transformers_moe_offload.formats.hqq import packing_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.hf.routers.find import find_router
from transformers_moe_offload.hf.upstream import tied_weights

logger = logging.getLogger(__name__)


def dense_linears(model: Any, layers: Iterable[SparseLayer], format: HqqFormat) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that `dense=` quantizes, with their paths.

    Skips the output embedding, routers, layers inside experts, tied weights, and layers whose number of inputs is not
    divisible by the group size.
    """
    head = model.get_output_embeddings()
    layers = list(layers)
    ties = tied_weights(model)
    tied = {name.removesuffix(".weight") for name in chain(ties, ties.values())}
    counts = {(layer.name.rpartition(".")[0], count) for layer in layers for count in (1, layer.num_experts)}
    routers = [router.path for layer in layers if (router := find_router(model, layer.name)) is not None]
    inside = tuple(f"{path}." for path in (*routers, *(layer.name for layer in layers)))
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module is head or name in tied or f"{name}.".startswith(inside):
            continue
        if module.in_features % format.group_size:
            logger.info(f"{name} stays as it is: group_size={format.group_size} does not divide {module.in_features}")
            continue
        if (name.rpartition(".")[0], module.out_features) in counts:
            continue
        yield name, module


def quantize_dense(model: Any, layers: Iterable[SparseLayer], format: HqqFormat) -> None:
    """Quantize the dense linear layers of a loaded model, one after another."""
    for name, linear in list(dense_linears(model, layers, format)):
        model.set_submodule(name, HqqLinear.quantize(linear, format))


def prepare_dense(model: Any, layers: Iterable[SparseLayer], format: HqqFormat) -> None:
    """Replace the dense linear layers of a model on meta by packed ones, to load a checkpoint's packed weights."""
    for name, linear in list(dense_linears(model, layers, format)):
        packing = packing_of(linear.out_features, linear.in_features, format)
        weight = linear.weight
        packed = HqqLinear(packing, bias=linear.bias is not None, dtype=weight.dtype, device=weight.device)
        model.set_submodule(name, packed)


def settle_dense(model: nn.Module) -> None:
    """Call `settle` of all packed layers, after a checkpoint's packed weights have been loaded."""
    for module in model.modules():
        if isinstance(module, HqqLinear):
            module.settle()


def restore_dense(model: nn.Module) -> None:
    """Replace packed layers by ordinary linear layers with decoded weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HqqLinear):
            model.set_submodule(name, module.dequantized())
