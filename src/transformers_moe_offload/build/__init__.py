"""Make mixture-of-experts checkpoints from dense ones. Knows nothing of caches.

from transformers_moe_offload.build import MoeRecipe, build_moe

recipe = MoeRecipe.from_file("mixture.yaml")
info = build_moe(recipe, "my-mixture")
"""

from transformers_moe_offload.build.build import build_moe, validate_recipe
from transformers_moe_offload.build.edit import add_expert, drop_expert, merge_to_dense, replace_expert
from transformers_moe_offload.build.info import MoeBuildInfo
from transformers_moe_offload.build.publish import publish
from transformers_moe_offload.build.recipe import MoeRecipe

__all__ = [
    "MoeBuildInfo",
    "MoeRecipe",
    "add_expert",
    "build_moe",
    "drop_expert",
    "merge_to_dense",
    "publish",
    "replace_expert",
    "validate_recipe",
]
