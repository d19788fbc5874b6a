"""Let the kernels compute the few rows of a model's modules, and undo it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn

from transformers_moe_offload.hf.few_rows.attention import FewRowsAttention
from transformers_moe_offload.hf.few_rows.attention_trial import attention_of, likeness
from transformers_moe_offload.hf.few_rows.linear import FewRowsLinear
from transformers_moe_offload.hf.few_rows.norm import FewRowsNorm, norm_of
from transformers_moe_offload.hf.few_rows.router import FewRowsRouter, route_of
from transformers_moe_offload.hf.few_rows.swapped import FewRows, swap_back, swapped
from transformers_moe_offload.hf.routers.find import find_router
from transformers_moe_offload.kernels import gpu, native
from transformers_moe_offload.kernels.attention import Attention


def use_kernels(model: Any, experts: Iterable[str]) -> None:
    """Let the kernels compute the few rows of linear layers, norms, attention and routers, where they can.

    `experts` are the paths of the experts modules.
    """
    if native.library() is None or gpu.cpu_stands_in():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRowsLinear
        elif not isinstance(module, FewRows):
            _swap(module, FewRowsNorm, norm_of(module))
    tried: dict[Hashable, Attention | None] = {}
    for module in model.modules():
        if isinstance(module._modules.get("q_proj"), nn.Linear) and not isinstance(module, FewRows):
            like = likeness(module)
            if like not in tried:
                tried[like] = attention_of(module)
            _swap(module, FewRowsAttention, tried[like])
    for path in experts:
        found = find_router(model, path)
        router = None if found is None else model.get_submodule(found.path)
        if router is not None and not isinstance(router, FewRows):
            _swap(router, FewRowsRouter, route_of(router))


def restore_forwards(model: nn.Module) -> None:
    """Give modules their own classes back."""
    for module in model.modules():
        if isinstance(module, FewRows):
            swap_back(module)


def _swap(module: Any, mixed_in: Any, how: Any) -> None:
    if how is not None:
        plain_class: Any = type(module)
        module.__class__ = swapped(mixed_in, plain_class, how)
