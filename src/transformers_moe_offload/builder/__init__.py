"""Make mixture-of-experts checkpoints from dense ones. Knows nothing of caches.

from transformers_moe_offload.builder import MoeRecipe, build_moe

recipe = MoeRecipe.from_file("mixture.yaml")
info = build_moe(recipe, "my-mixture")
"""

from transformers_moe_offload.builder.adapters.bake import bake_adapters
from transformers_moe_offload.builder.adapters.build import AdapterMoeInfo, build_adapter_moe
from transformers_moe_offload.builder.build import build_moe, validate_recipe
from transformers_moe_offload.builder.edit import add_expert, drop_expert, merge_to_dense, replace_expert
from transformers_moe_offload.builder.publish import publish
from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.sweep import SweepReport, sweep_gates
from transformers_moe_offload.builder.writing.info import MoeBuildInfo

__all__ = [
    "AdapterMoeInfo",
    "MoeBuildInfo",
    "MoeRecipe",
    "SweepReport",
    "add_expert",
    "bake_adapters",
    "build_adapter_moe",
    "build_moe",
    "drop_expert",
    "merge_to_dense",
    "publish",
    "replace_expert",
    "sweep_gates",
    "validate_recipe",
]
