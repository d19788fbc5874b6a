"""Is the mixture what the recipe asked for? Checks on the written files, before they are moved into their place."""

from __future__ import annotations

from transformers_moe_offload.errors import RecipeError


class CheckFailedError(RecipeError):
    """A mixture failed a check after it was written; its files are removed."""
