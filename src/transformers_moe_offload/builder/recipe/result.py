"""How the mixture is checked, written and published."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.builder.recipe.values import Section
from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.errors import ConfigError, RecipeError
from transformers_moe_offload.untrusted import quoted

LEVELS = ("error", "warn", "off")


@dataclass(frozen=True, kw_only=True)
class Checks(Section):
    """What is checked of the built model before it is put in its place. `identity`, `forced_expert` and `reload` cannot
    be turned off.

    Args:
        similarity: what happens if an expert has little in common with the base model: `error`, `warn` or `off`.
        licence: what happens if licences of sources exclude each other.
    """

    similarity: str = "warn"
    licence: str = "error"

    def __post_init__(self) -> None:
        self._expect_choice("similarity", LEVELS)
        self._expect_choice("licence", LEVELS)


@dataclass(frozen=True, kw_only=True)
class Output(Section):
    """How the checkpoint is written.

    Args:
        max_shard_size: as in `save_pretrained`.
    """

    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        _ = self.max_shard_bytes

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number."""
        try:
            nbytes = Budget.parse(self.max_shard_size, "max_shard_size").nbytes
        except ConfigError as error:
            raise RecipeError(
                f"max_shard_size={quoted(self.max_shard_size)} is not a size; write it as '5GB'"
            ) from error
        if nbytes is None:
            raise RecipeError(f"max_shard_size={quoted(self.max_shard_size)} is not a size, such as '5GB'")
        return nbytes


@dataclass(frozen=True, kw_only=True)
class Hub(Section):
    """Where and how it is published, with `--push` or `publish`.

    Args:
        repo_id: the repository.
        private: whether a new one is private.
        license: instead of what follows from the sources' licences.
        tags: beside our own.
        create_pr: upload as a pull request.
        revision: branch to upload to.
    """

    repo_id: str | None = None
    private: bool | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    create_pr: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        self._freeze_texts("tags")
