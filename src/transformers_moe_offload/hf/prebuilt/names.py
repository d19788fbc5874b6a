"""Names of the files of a prebuilt checkpoint, and of the classes that need this package to load it."""

from __future__ import annotations

from pathlib import Path

INDEX_NAME = "moe_offload.safetensors.index.json"
RECIPE_NAME = "moe_offload.recipe.json"
GUARD = Path(__file__).with_name("moe_offload_required.py")
"""Copied into every prebuilt checkpoint unchanged."""
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""The Auto classes that the guard has a placeholder for."""
