"""What to build, from what, into what."""

from transformers_moe_offload.builder.recipe.experts import Expert, SharedExpert, Split, Upcycle
from transformers_moe_offload.builder.recipe.origin import Dataset, Origin, Stem
from transformers_moe_offload.builder.recipe.recipe import MoeRecipe
from transformers_moe_offload.builder.recipe.result import Checks, Hub, Output
from transformers_moe_offload.builder.recipe.routers import AdapterRouting, Gate

__all__ = [
    "AdapterRouting",
    "Checks",
    "Dataset",
    "Expert",
    "Gate",
    "Hub",
    "MoeRecipe",
    "Origin",
    "Output",
    "SharedExpert",
    "Split",
    "Stem",
    "Upcycle",
]
