"""Make mixture-of-experts checkpoints from dense ones. Knows nothing of caches.

from transformers_moe_offload.build import MoeRecipe, build_moe

recipe = MoeRecipe.from_file("mixture.yaml")
info = build_moe(recipe, "my-mixture")
"""

from transformers_moe_offload.build.build import build_moe, validate_recipe
from transformers_moe_offload.build.info import MoeBuildInfo
from transformers_moe_offload.build.recipe import MoeRecipe
from transformers_moe_offload.build.sweep import SweepReport, sweep_gates

__all__ = ["MoeBuildInfo", "MoeRecipe", "SweepReport", "build_moe", "sweep_gates", "validate_recipe"]
