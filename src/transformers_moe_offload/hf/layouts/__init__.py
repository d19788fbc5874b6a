"""How each kind of experts module in Transformers stores its weights. One file per kind."""

from __future__ import annotations

from torch import nn

from transformers_moe_offload.hf.layouts.base import ExpertField, ExpertsLayout
from transformers_moe_offload.hf.layouts.dbrx import DbrxLayout
from transformers_moe_offload.hf.layouts.jetmoe import JetMoeLayout
from transformers_moe_offload.hf.layouts.llama4 import Llama4Layout
from transformers_moe_offload.hf.layouts.lora import LoraLayout
from transformers_moe_offload.hf.layouts.module_dict import ModuleDictLayout
from transformers_moe_offload.hf.layouts.stacked import StackedLayout

LAYOUTS: tuple[type[ExpertsLayout], ...] = (
    StackedLayout,
    DbrxLayout,
    JetMoeLayout,
    Llama4Layout,
    ModuleDictLayout,
    LoraLayout,
)

__all__ = ["LAYOUTS", "ExpertField", "ExpertsLayout", "layout_of"]


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a module that holds routed experts; None for any other module."""
    return next((layout() for layout in LAYOUTS if layout.matches(module)), None)
