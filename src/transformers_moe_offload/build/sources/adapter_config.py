"""What an adapter's `adapter_config.json` says, as far as merging it needs to know; the rest is refused by name.

PEFT has many kinds of LoRA that are merged in other ways (DoRA, aLoRA, BD-LoRA, ...). An option that is set and is
not known to leave the merge alone is an error, so that a kind that PEFT adds later is one too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.untrusted import quoted

CONFIG_NAME = "adapter_config.json"

_ABOUT_MERGING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias")
_ABOUT_TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "init_lora_weights", "eva_config", "ensure_weight_tying", "runtime_config", "megatron_core", "qalora_group_size",
    "fan_in_fan_out",  # is about Conv1D; for linear layers, of which all our containers are made, PEFT ignores it
)  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways of initialising that leave the base model as it is; the others store a difference to a changed one."""


@dataclass(frozen=True)
class AdapterConfig:
    """How the products of an adapter's matrices are scaled."""

    rank: int
    alpha: float
    uses_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model: str | None = None

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """From an adapter's folder; raises `RecipeError` for a kind of adapter that cannot be merged."""
        path = folder / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            kind, rank, alpha = values["peft_type"], values["r"], values["lora_alpha"]
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not the config of a LoRA adapter") from error
        if kind != "LORA":
            raise RecipeError(
                f"{folder.name} is an adapter of kind {kind}; only LORA is merged: merge it with PEFT first"
            )
        _expect_plain(folder.name, values)
        return cls(
            rank=rank,
            alpha=alpha,
            uses_rslora=bool(values.get("use_rslora")),
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            base_model=values.get("base_model_name_or_path"),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor on the product of a module's matrices: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)
        return alpha / rank**0.5 if self.uses_rslora else alpha / rank


def _key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that a module's name ends with, as `peft.utils.other.get_pattern_key` of 0.21 finds it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _expect_plain(name: str, values: Mapping[str, Any]) -> None:
    if values.get("bias", "none") != "none":
        raise RecipeError(
            f"{name} was trained with bias={quoted(values['bias'])}, and no container has a place for biases"
        )
    if values.get("init_lora_weights", True) not in _INITS:
        raise RecipeError(
            f"{name} was trained with init_lora_weights={quoted(values['init_lora_weights'])}, which changes the base "
            "model too; convert it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT first"
        )
    for option, value in values.items():
        if option not in (*_ABOUT_MERGING, *_ABOUT_TRAINING, "init_lora_weights") and value:
            raise RecipeError(
                f"{name} was trained with {option}={quoted(value)}, which is merged in another way than LoRA is; "
                "merge it with PEFT first, and give the merged model"
            )
