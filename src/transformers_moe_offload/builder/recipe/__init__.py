"""What to build, from what, into what."""

from transformers_moe_offload.builder.recipe.adapters import AdapterRouting
from transformers_moe_offload.builder.recipe.experts import Expert, SharedExpert
from transformers_moe_offload.builder.recipe.gate import Gate
from transformers_moe_offload.builder.recipe.one_model import Split, Upcycle
from transformers_moe_offload.builder.recipe.origin import Dataset, Origin
from transformers_moe_offload.builder.recipe.recipe import MoeRecipe
from transformers_moe_offload.builder.recipe.result import Checks, Hub, Output
from transformers_moe_offload.builder.recipe.stem import Stem

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
