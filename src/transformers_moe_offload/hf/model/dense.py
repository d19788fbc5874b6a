"""Which dense linear layers have their weights in low bits, in which format, and how they are swapped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from transformers_moe_offload.config import HqqFormat, OffloadConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.formats.hqq import packing_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.hf.routers.find import find_router
from transformers_moe_offload.hf.upstream import tied_weights

logger = logging.getLogger(__name__)


def dense_formats(model: Any, layers: Iterable[SparseLayer], config: OffloadConfig) -> dict[str, HqqFormat]:
    """Path -> format of the linear layers that `dense=` and `lm_head=` quantize.

    Raises `ConfigError` if there is nothing in the model that one of them fits.
    """
    found: dict[str, HqqFormat] = {}
    if config.dense is not None:
        found |= dict.fromkeys(_dense_linears(model, layers, config.dense), config.dense)
        if not found:
            raise ConfigError(
                f"{config.dense} fits none of the model's attention and dense MLP matrices; leave dense out, or choose "
                f"a group_size that divides their inputs"
            )
    if config.lm_head is not None:
        found[_head(model, config.lm_head)] = config.lm_head
    return found


def _dense_linears(model: Any, layers: Iterable[SparseLayer], format: HqqFormat) -> Iterator[str]:
    """Linear layers of attention and dense MLPs.

    Skips the output embedding, routers, layers inside experts, tied weights, and layers whose number of inputs is not
    divisible by the group size.
    """
    head = model.get_output_embeddings()
    layers = list(layers)
    tied = {name.removesuffix(".weight") for name in _tied(model)}
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
        yield name


def _head(model: Any, format: HqqFormat) -> str:
    """The output embedding; raises `ConfigError` if it cannot be in low bits."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or name is None:
        raise ConfigError(f"lm_head={format}: {type(model).__name__} has no output embedding; leave lm_head out")
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"lm_head={format}: {name}, the output embedding of {type(model).__name__}, is a {type(head).__name__}, "
            f"and only an nn.Linear can be in low bits; leave lm_head out"
        )
    if f"{name}.weight" in _tied(model):
        raise ConfigError(
            f"lm_head={format}: {name} of {type(model).__name__} shares its matrix with the input embedding "
            f"(tie_word_embeddings), which stays as it is; leave lm_head out"
        )
    if head.in_features % format.group_size:
        raise ConfigError(
            f"lm_head={format}: group_size={format.group_size} does not divide the {head.in_features} inputs of "
            f"{name}; choose a group_size that does, or leave lm_head out"
        )
    return name


def _tied(model: Any) -> set[str]:
    """Names of the parameters that share their memory with another one."""
    ties = tied_weights(model)
    return set(chain(ties, ties.values()))


def quantize_dense(model: Any, formats: Mapping[str, HqqFormat]) -> None:
    """Quantize linear layers of a loaded model, one after another; `formats` is path -> format."""
    for name, format in formats.items():
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise ConfigError(
                f"{name} has been loaded as a {type(linear).__name__}, and only an nn.Linear can be quantized; leave "
                f"lm_head out"
            )
        model.set_submodule(name, HqqLinear.quantize(linear, format))


def prepare_dense(model: Any, layers: Iterable[SparseLayer], config: OffloadConfig) -> None:
    """Replace linear layers of a model on meta by packed ones, to load a checkpoint's packed weights.

    A class without an output embedding, such as `AutoModel` makes, loads a checkpoint that has one in low bits, too.
    """
    if model.get_output_embeddings() is None:
        config = replace(config, lm_head=None)
    for name, format in dense_formats(model, layers, config).items():
        linear = model.get_submodule(name)
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
