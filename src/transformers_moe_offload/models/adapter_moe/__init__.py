"""A mixture of adapters: LoRA adapters as the experts of a dense model that stays in memory."""

from transformers import AutoConfig, AutoModelForCausalLM

from transformers_moe_offload.models.adapter_moe.configuration_adapter_moe import AdapterMoeConfig
from transformers_moe_offload.models.adapter_moe.modeling_adapter_moe import AdapterMoeForCausalLM

__all__ = ["AdapterMoeConfig", "AdapterMoeForCausalLM"]

AutoConfig.register(AdapterMoeConfig.model_type, AdapterMoeConfig)
AutoModelForCausalLM.register(AdapterMoeConfig, AdapterMoeForCausalLM)
# What save_pretrained writes can be loaded without this package, with trust_remote_code=True.
AdapterMoeConfig.register_for_auto_class()
AdapterMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
