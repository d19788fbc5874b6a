"""What a mixture's folder holds beside what every checkpoint has, and by which files it tells what it is."""

from __future__ import annotations

from transformers.utils import CONFIG_NAME

from transformers_moe_offload.output.place import Marks

RECIPE_NAME = "moe_offload_build.json"
"""What a mixture's recipe is called beside its weights: with the sources' commits, or how their files can be told."""

MARKS = Marks(first=RECIPE_NAME, last=CONFIG_NAME, prefix="moe_offload", is_in_place=False)
