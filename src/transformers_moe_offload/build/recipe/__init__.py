"""What to build, from what, into what."""

from transformers_moe_offload.build.recipe.recipe import (
    Checks,
    Dataset,
    Expert,
    Gate,
    Hub,
    MoeRecipe,
    Origin,
    Output,
    SharedExpert,
    Split,
    Stem,
    Upcycle,
)

__all__ = [
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
