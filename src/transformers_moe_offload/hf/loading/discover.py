"""Find the experts modules of a model that is still on meta, and turn them into sparse layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.hf.layouts import ExpertsLayout, layout_of
from transformers_moe_offload.hf.loading.placeholders import take_out
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, bind, layer_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertsLayout]]:
    """Every module that holds routed experts, with its path and layout.

    Raises `UnsupportedModelError` where experts have no weights.
    """
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None:
            for field in layout.fields(module):
                if 0 in field.shape:
                    raise UnsupportedModelError(
                        f"{name} has experts without weights: by the config, {field.name} of each is of shape "
                        f"{list(field.shape)}"
                    )
            yield name, module, layout


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Every module that holds routed experts, offloaded or not, with its path and the number of experts."""
    for name, module in model.named_modules():
        if isinstance(module, OffloadedExperts):
            yield name, module, layer_of(module).num_experts
        elif (layout := layout_of(module)) is not None:
            yield name, module, layout.num_experts(module)


def expert_spec(index: int, name: str, module: nn.Module, layout: ExpertsLayout) -> ExpertSpec:
    """The fields of a module's experts, from the shapes of its parameters."""
    fields = tuple(FieldSpec(f.name, f.shape, dtype_name(f.dtype)) for f in layout.fields(module))
    return ExpertSpec(index, name, layout.num_experts(module), fields)


def take_over(model: nn.Module) -> list[SparseLayer]:
    """Take all routed experts out of a model and bind a sparse layer to each of their modules.

    Raises `UnsupportedModelError` if there are none.
    """
    layers = []
    for index, (name, module, layout) in enumerate(list(find_experts(model))):
        fields, num_experts, eager_forward = (
            layout.fields(module),
            layout.num_experts(module),
            layout.eager_forward(module),
        )
        order = take_out(module, fields)
        layer = SparseLayer(index, name, type(module), layout, fields, num_experts, eager_forward, order)
        bind(module, layer)
        layers.append(layer)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts that can be offloaded; {_what_there_is(model)}. "
            f"Load it without offloading"
        )
    return layers


def _what_there_is(model: nn.Module) -> str:
    alike = sorted({type(m).__name__ for m in model.modules() if "expert" in type(m).__name__.lower()})
    if alike:
        return f"it has modules named {', '.join(alike)}, but not of a kind that routes tokens to experts"
    kinds = sorted({type(m).__name__ for m in model.modules() if not type(m).__module__.startswith("torch.")})
    return f"its modules are {', '.join(kinds[:6])}{', ...' if len(kinds) > 6 else ''}"


def refuse_kernels(model: nn.Module) -> None:
    """Raise if `use_kernels` could replace a block with offloaded experts by a kernel from the Hub."""
    for name, module in model.named_modules():
        kernel = getattr(module, "kernel_layer_name", None)
        if kernel is not None and any(isinstance(part, OffloadedExperts) for part in module.modules()):
            raise UnsupportedModelError(
                f"use_kernels would compute {name or type(model).__name__} with the kernel {kernel}, which reads "
                f"experts as parameters, but they are offloaded; leave use_kernels and kernel_config out"
            )
