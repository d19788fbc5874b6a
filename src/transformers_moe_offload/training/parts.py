"""Which parameters of a mixture-of-experts model are its routers, its experts, and so on.

Read from the modules, offloaded or not, never from the model's name. `recipes.py` decides what is done with the
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts
from transformers_moe_offload.hf.routers.find import Router, find_router

Parts = dict[str, nn.Parameter]
"""Parameters by their names in the model."""


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
    experts = set(experts_paths(model))
    paths = [
        path
        for path, module in model.named_modules()
        if path not in experts and (type(module).__name__.endswith("Attention") or "attn" in path.rpartition(".")[2])
    ]
    return _below(model, paths)


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
