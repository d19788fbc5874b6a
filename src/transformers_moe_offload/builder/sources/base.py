"""The builder's interface to a dense model: its config, and its tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedConfig

from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.tensor_files.index import StoredTensor


class Ancestor(NamedTuple):
    """A checkpoint that a source is made of."""

    name: str
    """Its id on the Hub, or the name of its folder."""
    revision: str | None
    """Its commit, if it is from the Hub."""
    files: tuple[Path, ...] = ()
    """Its weights."""
    card: Path | None = None
    """Its model card."""


class Source(Protocol):
    """A dense model, read tensor by tensor; it is never in memory as a whole."""

    @property
    def name(self) -> str:
        """Its id on the Hub, or the name of its folder; an adapter's is `base+adapter`."""

    @property
    def revision(self) -> str | None:
        """Its commit, if it is from the Hub."""

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """The checkpoints it is made of: itself, or a model and an adapter."""

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the dense model."""

    @property
    def tensors(self) -> Mapping[str, FieldSpec]:
        """What `save_pretrained` of the dense class writes, by name."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU and in the dtype that `tensors` says."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, without reading the others where possible."""

    def stored(self, name: str) -> StoredTensor | None:
        """The stored tensor that equals what `read` returns; None if that is computed."""

    def bring(self, names: Iterable[str]) -> None:
        """Download the files of these tensors that are not on this machine, ahead of `read`, which does it, too."""

    @property
    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, chat template, generation settings, licence: files that go along with any weights."""

    @property
    def card(self) -> Path | None:
        """Its model card, if it has one."""


class DerivedSource:
    """A source that takes everything but some tensors from another."""

    def __init__(self, origin: Source) -> None:
        self._origin = origin

    @property
    def revision(self) -> str | None:
        """The other's commit."""
        return self._origin.revision

    @property
    def config(self) -> PreTrainedConfig:
        """The other's."""
        return self._origin.config

    @property
    def companions(self) -> tuple[Path, ...]:
        """The other's."""
        return self._origin.companions

    @property
    def card(self) -> Path | None:
        """The other's model card."""
        return self._origin.card
