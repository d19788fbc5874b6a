"""The options of an adapter's `adapter_config.json` that merging depends on; unknown ones are refused by name.

PEFT has many kinds of LoRA that are merged in other ways (DoRA, aLoRA, BD-LoRA, ...). An option that is set is an error
unless it is known not to change the merge, so that kinds that PEFT adds later are refused, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.models.adapter_moe.patterns import expect_patterns, pattern_key
from transformers_moe_offload.untrusted import json_object, one_line, quoted

CONFIG_NAME = "adapter_config.json"

_ABOUT_MERGING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias")
_ABOUT_TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "init_lora_weights", "eva_config", "ensure_weight_tying", "runtime_config", "megatron_core", "qalora_group_size",
    "fan_in_fan_out",  # for Conv1D only; PEFT ignores it for linear layers, and all our containers have these
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
        base_model = values.get("base_model_name_or_path")
        return cls(
            rank=values["r"],
            alpha=values["lora_alpha"],
            uses_rslora=bool(values.get("use_rslora")),
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            base_model=one_line(base_model) if isinstance(base_model, str) else None,
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices."""
        return _of(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor on the product of a module's matrices: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
        rank, alpha = self.rank_of(module), _of(self.alpha_pattern, module, self.alpha)
        return alpha / rank**0.5 if self.uses_rslora else alpha / rank


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with."""
    found = pattern_key(patterns, module)
    return default if found is None else patterns[found]


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
