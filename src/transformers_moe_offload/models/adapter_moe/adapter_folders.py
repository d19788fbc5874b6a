"""Adapters as PEFT keeps them: a folder each, with `adapter_config.json` and `adapter_model.safetensors`.

A config may give ranks and alphas by pattern (`rank_pattern`, `alpha_pattern`): a regular expression for the end of a
module's path (`peft/utils/other.py`, `get_pattern_key`, 0.21). It comes with the adapter, and one such as `(a+)+` keeps
Python busy for ever. So patterns are read that have few ways to match; those PEFT's users write are names, or names
with one or two numbers left open.
"""

# R rank

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .configuration_adapter_moe import AdapterMoeError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FOLDER = "adapters"
"""Where a mixture's adapters are, each in a folder of its name."""
_PREFIX = "base_model.model."
_KEY = "base_model.model.{path}.lora_{matrix}.weight"

_REFUSED = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "trainable_token_indices")
"""Options of PEFT's LoRA that make an adapter more than two matrices a layer."""

_REPLACED = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that take something out of the dense weights before training
(`peft/tuners/lora/layer.py`, 0.21): the adapter only fits what was left of them. PEFT's conversion writes True."""

_ATOM = r"(?:[\w\-/. ]|\\[.dw\-]|\[[\w\-]+\])"
_PIECES = rf"(?:{_ATOM}[*+?]?)*"
_GROUP = rf"\((?:\?:)?{_PIECES}(?:\|{_PIECES})*\)"
_READ = re.compile(rf"\^?(?:{_ATOM}[*+?]?|{_GROUP})+\$?")
"""Characters, classes and groups that are not repeated as a whole."""
_MAX_CHARACTERS = 500
_MAX_REPEATS = 2
_MAX_CHOICES = 128
_MAX_OPEN = 1000
"""Patterns that are no plain names; plain ones are compared in no time."""


@dataclass(frozen=True)
class WeightsFile:
    """By what a file is known again: two adapters of one kind have files of equal names and sizes."""

    nbytes: int
    device: int
    inode: int
    modified_ns: int

    @classmethod
    def now(cls, path: Path) -> WeightsFile:
        """What a path leads to; a file that is gone is an `AdapterMoeError`."""
        try:
            found = os.stat(path)
        except OSError as error:
            raise AdapterMoeError(f"cannot read {path}: {error.strerror}; put the file back and try again") from error
        return cls(found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns)

    def __str__(self) -> str:
        """In a message."""
        written = f"{self.modified_ns / 10**9:.9f}"
        return f"inode {self.inode} of device {self.device}, {self.nbytes:,} bytes, written {written} s after 1970"


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter on disk."""

    folder: Path
    config: Mapping[str, Any]
    stored: WeightsFile
    """What the file of its weights was when it was opened."""

    @classmethod
    def open(cls, folder: Path) -> AdapterFolder:
        """Read an adapter's config; raises `AdapterMoeError` if it is no LoRA adapter or has more than we know."""
        try:
            folder = folder.absolute()  # whatever the working directory is when it is read
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise AdapterMoeError(f"{folder} is no PEFT adapter: {CONFIG_NAME} cannot be read ({error})") from error
        if not isinstance(config, dict):
            holds = type(config).__name__
            raise AdapterMoeError(f"{folder} is no PEFT adapter: {CONFIG_NAME} holds a {holds}")
        if config.get("peft_type") != "LORA":
            kind = str(config.get("peft_type"))[:40]
            raise AdapterMoeError(f"{folder} is an adapter of type {kind}; only LORA can be mixed")
        refused = [name for name in _REFUSED if config.get(name)]
        if config.get("bias", "none") != "none":
            refused.append("bias")
        if config.get("modules_to_save"):
            refused.append("modules_to_save")
        if str(config.get("init_lora_weights")).lower().startswith(_REPLACED):
            refused.append("init_lora_weights")
        if refused:
            raise AdapterMoeError(f"{folder} uses {refused[0]}={repr(config[refused[0]])[:100]}, which cannot be mixed")
        for name in ("r", "lora_alpha"):
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
                raise AdapterMoeError(f"{folder} has no number above 0 for {name} in its {CONFIG_NAME}")
        for name in ("rank_pattern", "alpha_pattern"):
            try:
                expect_patterns(name, config.get(name) or {})
            except ValueError as error:
                raise AdapterMoeError(f"{folder}: {error}") from error
        if not (folder / WEIGHTS_NAME).is_file():
            raise AdapterMoeError(f"{folder} has no {WEIGHTS_NAME}; adapters in other files are not read")
        return cls(folder, config, WeightsFile.now(folder / WEIGHTS_NAME))

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.folder / WEIGHTS_NAME

    def scaling(self, path: str) -> float:
        """Alpha over rank, or over its root, for a linear layer (`peft/tuners/lora/layer.py`, 0.21)."""
        return scaling(self.config, path)

    def paths(self) -> dict[str, int]:
        """The linear layers that it adds to -> its rank there; raises `ValueError` for what else it changes."""
        pattern = re.compile(re.escape(_KEY).replace(r"\{path\}", "(.+)").replace(r"\{matrix\}", "([AB])"))
        found = {}
        with self._tensors() as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                match = pattern.fullmatch(name)
                if match is None and _is_copy(name):
                    continue
                if match is None:
                    raise AdapterMoeError(f"{self.weights} has {name[:200]}, which is no LoRA matrix of a linear layer")
                if match[2] == "A":
                    found[match[1]] = tensors.get_slice(name).get_shape()[0]
        return found

    def copies(self) -> dict[str, Tensor]:
        """Whole weights of embeddings or the head, by their names in the dense model.

        PEFT writes them beside LoRA on either, and where it thinks that the vocabulary grew. A mixture has one of each
        for all adapters, so they have to be the dense model's own.
        """
        with self._tensors() as tensors:
            names = [name for name in tensors.keys() if _is_copy(name)]  # noqa: SIM118  not a mapping
            return {_dense_name(name): tensors.get_tensor(name) for name in names}

    def read(self, path: str) -> tuple[Tensor, Tensor] | None:
        """Matrices A (R, in) and B (out, R) of a linear layer; None if the adapter does not add to it."""
        with self._tensors() as tensors:
            if key(path, "A") not in tensors.keys():  # noqa: SIM118  not a mapping
                return None
            return tensors.get_tensor(key(path, "A")), tensors.get_tensor(key(path, "B"))

    def expect_unchanged(self) -> None:
        """Raise `ValueError` if the file of its weights is another one by now, or was written to."""
        found = WeightsFile.now(self.weights)
        if found != self.stored:
            raise AdapterMoeError(
                f"{self.weights} is not what it was when the adapter was opened: it is {found}, but was {self.stored}; "
                f"load the model again, or put the very file back"
            )

    @contextmanager
    def _tensors(self) -> Iterator[Any]:
        self.expect_unchanged()
        with safe_open(self.weights, "pt") as tensors:
            yield tensors


def _is_copy(name: str) -> bool:
    """Whether this is a module's own weight, and nothing that LoRA adds."""
    return name.startswith(_PREFIX) and name.endswith(".weight") and ".lora_" not in name


def _dense_name(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def key(path: str, matrix: str) -> str:
    """What an adapter's file calls matrix `A` or `B` of a linear layer."""
    return _KEY.format(path=path, matrix=matrix)


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank of the matrices of a linear layer."""
    return _of_pattern(config, "rank_pattern", path, config["r"])


def scaling(config: Mapping[str, Any], path: str) -> float:
    """The factor on the product of a linear layer's matrices: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    rank, alpha = rank_of(config, path), _of_pattern(config, "alpha_pattern", path, config["lora_alpha"])
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _of_pattern(config: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    """A value that may differ by layer: that of the first pattern that the end of a path matches."""
    patterns = config.get(name) or {}
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def expect_patterns(name: str, patterns: Any) -> None:
    """Raise `AdapterMoeError` for what is no mapping of patterns that are read to numbers above zero."""
    if not isinstance(patterns, dict):
        raise AdapterMoeError(f"{name} is no mapping of modules to numbers but a {type(patterns).__name__}")
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise AdapterMoeError(f"{name} has no number above 0 for {_brief(pattern)}")
        if not _is_read(pattern):
            raise AdapterMoeError(
                f"{name} has the pattern {_brief(pattern)}; patterns are read that name modules, with up to "
                f"{_MAX_REPEATS} parts repeated by *, + or ? and no repeated groups: write the modules' names instead"
            )
    if sum(not re.fullmatch(r"[\w.]+", pattern) for pattern in patterns) > _MAX_OPEN:
        raise AdapterMoeError(f"{name} has more than {_MAX_OPEN} patterns that are no plain names")


def _is_read(pattern: str) -> bool:
    # The length comes first, so that this check itself is quick.
    if len(pattern) > _MAX_CHARACTERS or not _READ.fullmatch(pattern):
        return False
    repeats = sum(pattern.replace("(?:", "(").count(sign) for sign in "*+?")
    choices = 1
    for group in re.findall(r"\([^)]*\)", pattern):
        choices *= group.count("|") + 1
    if repeats > _MAX_REPEATS or choices > _MAX_CHOICES:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
