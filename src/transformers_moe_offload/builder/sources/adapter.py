"""A dense model with a LoRA adapter; each tensor is merged when it is read.

Merged tensors are in float32 whatever the base model is stored in, so that they are rounded once, at the end.
Layout and formula: PEFT 0.21, `tuners/lora/layer.py`; W + scale * B A (arXiv 2106.09685).
"""

# O outputs, I inputs of a linear layer, R rank, V entries of a vocabulary

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from transformers_moe_offload.builder.sources.base import Ancestor, DerivedSource, Source
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.models.adapter_moe.adapter_folders import expect_patterns, rank_of, scaling
from transformers_moe_offload.tensor_files.index import StoredTensor, read_index
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.untrusted import json_object, one_line, quoted

_CONFIG = "adapter_config.json"

_ABOUT_MERGING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias")
_ABOUT_TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "init_lora_weights", "eva_config", "ensure_weight_tying", "runtime_config", "megatron_core", "qalora_group_size",
    "fan_in_fan_out",  # for Conv1D only; PEFT ignores it for linear layers, and all our containers have these
)  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways of initialising that leave the base model as it is; the others store a difference to a changed one."""
_WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"
_PREFIX = "base_model.model."


class AdapterSource(DerivedSource):
    """A base model and an adapter, whose commit is among the `ancestors`."""

    def __init__(self, base: Source, folder: Path, ancestor: Ancestor) -> None:
        """Raises an error of ours for tensors of the adapter that would not be merged."""
        self._base, self._ancestor, self._config = base, ancestor, read_config(folder)
        weights = folder / _WEIGHTS
        if not weights.is_file():
            raise CheckpointError(
                f"{ancestor.name} has no {_WEIGHTS}; only safetensors are read, so load the adapter where you trust it "
                f"and call save_pretrained"
            )
        self._pairs, self._whole = self._parts(read_index([weights]))
        super().__init__(base, self._pairs.keys() | self._whole.keys())
        self.name = f"{base.name}+{ancestor.name}"
        self.ancestors = (*base.ancestors, ancestor)
        self.config, self.companions = base.config, base.companions

    @classmethod
    def open(cls, base: Source, name: str, options: Mapping[str, Any]) -> AdapterSource:
        """An adapter in a folder or from the Hub, on a base model."""
        if Path(name).is_dir():
            return cls(base, Path(name), _ancestor(Path(name).resolve().name, None, Path(name)))
        try:
            folder = Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS, _CARD], **options))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the adapter {name}: there is no such folder, and from the Hub it cannot be read: "
                f"{one_line(error, 600)}"
            ) from error
        return cls(base, folder, _ancestor(name, folder.name, folder))

    def read(self, name: str) -> Tensor:
        """One tensor, merged."""
        # Embeddings can have both a whole tensor and a pair: the pair is added to the whole tensor.
        tensor = read_stored(self._whole[name]).float() if name in self._whole else self._base.read(name)
        if name not in self._pairs:
            return tensor
        first, second = (read_stored(one).float() for one in self._pairs[name])
        scale = scaling(self._config, name.removesuffix(".weight"))
        product = second @ first
        return torch.add(tensor.float(), product if product.shape == tensor.shape else product.T, alpha=scale)

    def _parts(
        self, stored: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
        """The adapter's pairs of matrices and its whole tensors, by the name of the base model's tensor."""
        pairs: dict[str, tuple[StoredTensor, StoredTensor]] = {}
        whole: dict[str, StoredTensor] = {}
        for key, one in stored.items():
            module, is_first, is_second = _place(key)
            name = module if module in self._base.tensors else f"{module}.weight"
            if name not in self._base.tensors:
                raise CheckpointError(f"{self._ancestor.name} changes {module}, which {self._base.name} does not have")
            if is_first:
                second = stored.get(key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B"))
                if second is None:
                    raise CheckpointError(f"{self._ancestor.name} has {key} without the second matrix of its pair")
                self._expect_pair(name, one, second)
                pairs[name] = (one, second)
            elif not is_second:
                self._expect_shape(name, one.shape)
                whole[name] = one
        return pairs, whole

    def _expect_pair(self, name: str, first: StoredTensor, second: StoredTensor) -> None:
        rank = rank_of(self._config, name.removesuffix(".weight"))
        if first.shape[0] != rank or second.shape[1] != rank:
            raise CheckpointError(
                f"{self._ancestor.name} has matrices of {list(first.shape)} and {list(second.shape)} for {name}, but "
                f"its config says rank {rank}"
            )
        shape = (second.shape[0], first.shape[1])
        self._expect_shape(name, shape[::-1] if "embedding" in first.name else shape)

    def _expect_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = self._base.tensors[name].shape
        if shape != expected:
            raise CheckpointError(
                f"{self._ancestor.name} changes {name} as {list(shape)}, but {self._base.name} has {list(expected)}; "
                f"the adapter belongs to another model ({one_line(self._config.get('base_model_name_or_path'))})"
            )


def _ancestor(name: str, revision: str | None, folder: Path) -> Ancestor:
    card = folder / _CARD
    return Ancestor(name, revision, (folder / _WEIGHTS,), card if card.is_file() else None)


def _place(key: str) -> tuple[str, bool, bool]:
    """The base model's module that a tensor of the adapter belongs to; whether it is a pair's first, or its second."""
    module = key.removeprefix(_PREFIX)
    found = re.fullmatch(r"(.+?)\.lora_(?:embedding_)?([AB])(?:\.weight)?", module)
    if found:
        return found[1].removesuffix(".base_layer"), found[2] == "A", found[2] == "B"
    return module.replace(".base_layer.", ".").replace(".modules_to_save.", "."), False, False


def read_config(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter's folder; raises `RecipeError` for one that cannot be merged.

    PEFT has many kinds of LoRA that are merged in other ways (DoRA, aLoRA, BD-LoRA, ...). An option that is set is an
    error unless it is known not to change the merge, so that kinds that PEFT adds later are refused, too.
    """
    path = folder / _CONFIG
    try:
        values = json_object(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise CheckpointError(f"{error}; it is not the config of a LoRA adapter") from error
    if "peft_type" not in values:
        raise CheckpointError(f"{path} is not the config of a LoRA adapter: it has no peft_type")
    kind = values["peft_type"]
    if kind != "LORA":
        raise RecipeError(
            f"{folder.name} is an adapter of kind {quoted(kind)}; only LORA is merged: merge it with PEFT first"
        )
    for name in ("r", "lora_alpha"):
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), int | float):
            raise CheckpointError(
                f"{path} is not the config of a LoRA adapter: its {name} is {quoted(values.get(name))}"
            )
        if not 0 < values[name] < 2**31:
            raise CheckpointError(f"{path} has {name}={quoted(values[name])}, which is no number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            expect_patterns(name, values.get(name) or {})
        except ValueError as error:
            raise RecipeError(f"{folder.name}: {error}") from error
    _expect_plain(folder.name, values)
    return values


def _expect_plain(name: str, values: Mapping[str, Any]) -> None:
    if values.get("bias", "none") != "none":
        raise RecipeError(
            f"{name} was trained with bias={quoted(values['bias'])}, and no container has a place for biases"
        )
    init = values.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise RecipeError(
            f"{name} was trained with init_lora_weights={quoted(values['init_lora_weights'])}, which changes the base "
            "model too; convert it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT first"
        )
    for option, value in values.items():
        if option not in (*_ABOUT_MERGING, *_ABOUT_TRAINING, "init_lora_weights") and value:
            raise RecipeError(
                f"{name} was trained with {one_line(option, 60)}={quoted(value)}, which is merged in another way than "
                "LoRA is; merge it with PEFT first, and give the merged model"
            )
