"""Choose the parts of a mixture-of-experts model that are trained.

For models that were assembled from others there is a customary order, from the least that can be learnt to the most:
the routers alone; routers with embeddings or attention, which see the experts' domains for the first time together;
experts between frozen shared weights, so that they stay interchangeable (FlexOlmo, arXiv 2507.07024, section 3);
routers and all shared weights, as Branch-Train-MiX ends (arXiv 2403.07816, section 3.2); everything.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.model.dense import HqqLinear
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts
from transformers_moe_offload.training.parts import PARTS, routers

RECIPES = ("router", "router+embeddings", "router+attention", "router+stem", "experts", "all")


def set_trainable(model: Any, recipe: str) -> list[str]:
    """Train the named parts of a model and freeze everything else; returns the names of what is trained.

    `recipe` is one of `RECIPES`, or any of "router", "embeddings", "attention", "stem" and "experts" joined by "+".
    Offloaded experts are frozen, so "experts" and "all" are for plain models; an error says what there is instead.
    """
    if recipe not in RECIPES:
        for part in recipe.split("+"):
            choose("recipe", part, (*PARTS, "all"))
    parts = ("experts", "router", "stem") if recipe == "all" else tuple(recipe.split("+"))
    if "experts" in parts:
        _expect_experts(model, recipe)
    found = {part: PARTS[part](model) for part in parts}
    for part, parameters in found.items():
        _expect_trainable(model, part, parameters)
    model.requires_grad_(False)
    return _train({name: parameter for parameters in found.values() for name, parameter in parameters.items()})


def unfreeze_routers(model: Any) -> list[str]:
    """Train a model's routers, too; returns their names. Other parameters stay trained or frozen as they are."""
    found = routers(model)
    _expect_trainable(model, "router", found)
    return _train(found)


def _train(parameters: dict[str, nn.Parameter]) -> list[str]:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return sorted(parameters)


def _expect_experts(model: nn.Module, recipe: str) -> None:
    offloaded = next((name for name, module in model.named_modules() if isinstance(module, OffloadedExperts)), None)
    if offloaded is not None:
        raise ConfigError(
            f"recipe={recipe!r} would train experts, but those of {offloaded} are offloaded and frozen; use "
            f"unfreeze_experts for some of them, LoraConfig from lora_config for all, or restore() the model first"
        )


def _expect_trainable(model: Any, part: str, parameters: dict[str, nn.Parameter]) -> None:
    quantized = [name for name, module in model.named_modules() if isinstance(module, HqqLinear)]
    if part in ("attention", "stem") and quantized:
        raise ConfigError(
            f"{part!r} cannot be trained: {quantized[0]} and {len(quantized) - 1} more are in low bits "
            f"(OffloadConfig.dense) and constant; load the model without dense=, or put adapters on them"
        )
    if not parameters:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters that are {part!r}")
