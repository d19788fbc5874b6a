"""Is the mixture what the recipe asked for? Asked of the files that were written, before they are in their place."""

from __future__ import annotations

from transformers_moe_offload.errors import RecipeError


class CheckFailedError(RecipeError):
    """A mixture that was written and is not what it should be; its files are removed."""
