"""Fine-tune mixture-of-experts models, offloaded or not.

from transformers_moe_offload import training

training.set_trainable(model, "router")
"""

from transformers_moe_offload.training.experts import unfreeze_experts
from transformers_moe_offload.training.recipes import RECIPES, set_trainable, unfreeze_routers

__all__ = ["RECIPES", "set_trainable", "unfreeze_experts", "unfreeze_routers"]
