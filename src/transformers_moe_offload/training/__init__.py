"""Fine-tune mixture-of-experts models, offloaded or not.

from transformers_moe_offload import training

training.set_trainable(model, "router")
"""

from transformers_moe_offload.training.callback import MoeOffloadCallback
from transformers_moe_offload.training.experts import unfreeze_experts
from transformers_moe_offload.training.lora import lora_config, save_merged
from transformers_moe_offload.training.recipes import RECIPES, set_trainable, unfreeze_routers
from transformers_moe_offload.training.routers import RouterRegulariser

__all__ = [
    "RECIPES",
    "MoeOffloadCallback",
    "RouterRegulariser",
    "lora_config",
    "save_merged",
    "set_trainable",
    "unfreeze_experts",
    "unfreeze_routers",
]
