"""Choose the parts of a mixture-of-experts model that are trained: routers, experts, attention and so on.

Parts are read from the modules, offloaded or not, never from the model's name.

For models that were assembled from others there is a customary order, from the least that can be learnt to the most:
the routers alone; routers with embeddings or attention, which see the experts' domains for the first time together;
experts between frozen shared weights, so that they stay interchangeable (FlexOlmo, arXiv 2507.07024, section 3);
routers and all shared weights, as Branch-Train-MiX ends (arXiv 2403.07816, section 3.2); everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.hf.routers.find import Router, find_router

Parts = dict[str, nn.Parameter]
"""Parameters by their names in the model."""

RECIPES = ("router", "router+embeddings", "router+attention", "router+stem", "experts", "all")
"""The customary choices for `set_trainable`, from the least that can be learnt to the most."""


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


def experts_paths(model: nn.Module) -> list[str]:
    """The modules that hold routed experts, offloaded or not, in the order of the model."""
    plain = {name for name, _, _ in find_experts(model)}
    return [name for name, module in model.named_modules() if name in plain or isinstance(module, OffloadedExperts)]


def router_paths(model: nn.Module) -> list[str]:
    """The router of each of these modules, each once; an error names a module whose router is not found."""
    return list(dict.fromkeys(router.path for router in _found_routers(model)))


def _found_routers(model: nn.Module) -> list[Router]:
    paths = experts_paths(model)
    found = {path: find_router(model, path) for path in paths}
    missing = [path for path, router in found.items() if router is None]
    if not paths:
        raise UnsupportedModelError(f"{type(model).__name__} has no routed experts, so there are no routers to train")
    if missing:
        raise UnsupportedModelError(
            f"no module beside {missing[0]} (and {len(missing) - 1} more) can be told to be its router; set "
            f"requires_grad_(True) on the routers of {type(model).__name__} yourself"
        )
    return [router for router in found.values() if router is not None]


def routers(model: nn.Module) -> Parts:
    """The parameters that score experts. A correction that only affects the choice has no gradient and is left out."""
    found = _found_routers(model)
    corrections = {id(router.correction()) for router in found if router.correction is not None}
    parts = _below(model, [router.path for router in found])
    return {name: parameter for name, parameter in parts.items() if id(parameter) not in corrections}


def embeddings(model: Any) -> Parts:
    """The input embedding, and with it an output embedding that is tied to it."""
    weight = model.get_input_embeddings().weight
    return {name: parameter for name, parameter in model.named_parameters() if parameter is weight}


def attention(model: nn.Module) -> Parts:
    """The parameters that mix tokens: those of all modules that are called attention."""
    return _below(model, _attention_paths(model))


def _attention_paths(model: nn.Module) -> list[str]:
    experts = set(experts_paths(model))
    return [
        path
        for path, module in model.named_modules()
        if path not in experts and (type(module).__name__.endswith("Attention") or "attn" in path.rpartition(".")[2])
    ]


def experts(model: nn.Module) -> Parts:
    """The routed experts that are parameters of the model; none where they are offloaded."""
    return _below(model, experts_paths(model))


def stem(model: nn.Module) -> Parts:
    """Everything that is neither a routed expert nor its router: the weights that all tokens share."""
    others = {*experts(model), *_below(model, router_paths(model))}
    return {name: parameter for name, parameter in model.named_parameters() if name not in others}


PARTS: dict[str, Callable[[Any], Parts]] = {
    "router": routers,
    "embeddings": embeddings,
    "attention": attention,
    "experts": experts,
    "stem": stem,
}


def _below(model: nn.Module, paths: list[str]) -> Parts:
    """The parameters of some modules, each under the one name that it has in the model."""
    found = {id(parameter) for path in paths for parameter in model.get_submodule(path).parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in found}


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
    paths = {"attention": _attention_paths(model), "stem": [""]}.get(part, [])
    parts = [module for path in paths for module in model.get_submodule(path).modules()]
    quantized = [name for name, module in model.named_modules() if isinstance(module, HqqLinear) and module in parts]
    if quantized:
        raise ConfigError(
            f"{part!r} cannot be trained: {quantized[0]} and {len(quantized) - 1} more are in low bits "
            f"(OffloadConfig.dense or lm_head) and constant; load the model without dense= and lm_head=, or put "
            f"adapters on them"
        )
    if not parameters:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters that are {part!r}")
