"""The builder's interface to a dense model: its config, and its tensors, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
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

    name: str
    """Its id on the Hub, or the name of its folder; an adapter's is `base+adapter`."""
    ancestors: tuple[Ancestor, ...]
    """The checkpoints it is made of: itself, or a model and an adapter."""
    config: PreTrainedConfig
    """The config of the dense model."""
    tensors: Mapping[str, FieldSpec]
    """What `save_pretrained` of the dense class writes, by name."""
    companions: tuple[Path, ...]
    """Tokenizer, chat template, generation settings, licence: files that go along with any weights."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU and in the dtype that `tensors` says."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, without reading the others where possible."""

    def stored(self, name: str) -> StoredTensor | None:
        """The stored tensor that equals what `read` returns; None if that is computed."""

    def bring(self, names: Iterable[str]) -> None:
        """Download the files of these tensors that are not on this machine, ahead of `read`, which does it, too."""


class DerivedSource(ABC):
    """A base model of which some tensors are computed when they are read, in float32; the others are its own."""

    def __init__(self, base: Source, computed: Collection[str]) -> None:
        self._base, self._computed = base, computed
        self.tensors: Mapping[str, FieldSpec] = {
            name: one.cast("float32") if name in computed else one for name, one in base.tensors.items()
        }

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, computed or the base model's."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it; a tensor that is computed is computed as a whole."""
        return self.read(name)[start:stop] if name in self._computed else self._base.read_rows(name, start, stop)

    def stored(self, name: str) -> StoredTensor | None:
        """The base model's stored tensor; None for those that are computed."""
        return None if name in self._computed else self._base.stored(name)

    def bring(self, names: Iterable[str]) -> None:
        """Download the base model's files."""
        self._base.bring(names)
