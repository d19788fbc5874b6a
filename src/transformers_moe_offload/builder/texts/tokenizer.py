"""The tokenizer that a recipe's texts are read with, and the files of the one that goes along with a mixture.

Those are copied unchanged: loading and saving a tokenizer changes its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from transformers_moe_offload.builder.recipe import MoeRecipe
from transformers_moe_offload.builder.recipe.routers import DRAWN
from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hub.fetch import TOKENIZER_FILES, files_in, is_tokenizer_file
from transformers_moe_offload.untrusted import one_line


def tokenizer_for(recipe: MoeRecipe, base: Source) -> Any:
    """The base model's tokenizer if the recipe has texts to read; else None."""
    texts: list[Any] = [recipe.split.dataset] if recipe.split is not None and recipe.split.dataset is not None else []
    if recipe.gate.mode not in DRAWN:
        texts += [text for expert in recipe.experts for text in (*expert.positive_prompts, expert.dataset) if text]
    if not texts:
        return None
    folders = {file.parent for file in base.companions if is_tokenizer_file(file.name)}
    if not folders:
        raise CheckpointError(f"{base.name} has no tokenizer to read the texts of its experts with; add one to it")
    return read_tokenizer(folders.pop(), base.name)


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in a folder; raises an error of ours that names its model."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the tokenizer of {name}: {one_line(error, 600)}") from error


def tokenizer_files(name: str, options: Mapping[str, Any]) -> list[Path]:
    """The files of the tokenizer in a folder, or of an id on the Hub, or `id@revision`.

    `options` are `token` and `local_files_only`.
    """
    folder = Path(name)
    if not folder.is_dir():
        repo, _, revision = name.partition("@")
        try:
            folder = Path(
                snapshot_download(repo, revision=revision or None, allow_patterns=list(TOKENIZER_FILES), **options)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the tokenizer {name}: {one_line(error, 600)}") from error
    files = files_in(folder, TOKENIZER_FILES)
    if not files:
        raise CheckpointError(f"{name} has no tokenizer; set tokenizer to a model that has one, or leave it out")
    return files
