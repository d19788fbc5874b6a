"""Recipes of mergekit-moe (https://github.com/arcee-ai/mergekit, version 0.1.5), with the meaning they have there.

mergekit ignores keys that it does not know, so that a misspelt one changes nothing; here it is an error. Its container
`deepseek` needs code from the Hub and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers_moe_offload.builder.recipe.reading import Place, expect_known
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted

_TOP = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_GATE_MODES = {
    "hidden": "hidden",  # the last token's
    "hidden_last": "hidden",
    "hidden_avg": "hidden_avg",
    "cheap_embed": "cheap_embed",
    "random": "random",
    "uniform_random": "uniform",
}
_CONTAINERS = {"mixtral": "mixtral", "qwen": "auto", "qwen3": "qwen3_moe"}


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of ours with the same meaning."""
    try:
        return _translated(values)
    except RecipeError as error:
        raise RecipeError(f"{error} (without `schema: 1` a recipe is read as one of mergekit-moe)") from error


def _translated(values: Mapping[str, Any]) -> dict[str, Any]:
    top = Place()
    expect_known(list(values), _TOP, top)
    recipe: dict[str, Any] = {"schema": 1}
    for name in ("base_model", "dtype", "experts_per_token"):
        if values.get(name) is not None:
            recipe[name] = values[name]
    mode = values.get("gate_mode", "hidden")
    if not isinstance(mode, str):
        raise top.at("gate_mode").error(f"{quoted(mode)} is not one of {', '.join(_GATE_MODES)}")
    expect_known([mode], list(_GATE_MODES), top.at("gate_mode"))
    recipe["gate"] = {"mode": _GATE_MODES[mode], "scoring": "mergekit", "site": "layer_input"}
    recipe["container"] = _container(values.get("architecture"))
    recipe["experts"] = _experts(values, "experts")
    if values.get("shared_experts"):
        recipe["shared_experts"] = [
            expert | ({"gated": True} if expert.get("positive_prompts") else {})
            for expert in _experts(values, "shared_experts")
        ]
    return recipe


def _container(architecture: Any) -> str:
    """The container; mergekit accepts any prefix of its own names."""
    if not architecture:
        return "auto"
    words = architecture.lower().split() if isinstance(architecture, str) else ()
    beginning = words[0].split("_")[0] if words else "?"
    if "deepseek".startswith(beginning) or not any(name.startswith(beginning) for name in _CONTAINERS):
        raise RecipeError(
            f"architecture: {quoted(architecture)} is not one that is built here; mergekit's are mixtral, qwen and "
            "qwen3 (its deepseek needs code from the Hub), and container: names all of ours"
        )
    return next(target for name, target in _CONTAINERS.items() if name.startswith(beginning))


def _experts(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    experts = values.get(name) or ()
    if not isinstance(experts, list | tuple):
        raise Place(name).error(f"{quoted(experts)} is not a list")
    return [_expert(value, Place(f"{name}.{n}")) for n, value in enumerate(experts)]


def _expert(values: Any, place: Place) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise place.error(f"{quoted(values)} is not a mapping of {', '.join(_EXPERT)}")
    expect_known(list(values), _EXPERT, place)
    renamed = {"source" if name == "source_model" else name: value for name, value in values.items()}
    return {name: value for name, value in renamed.items() if value is not None}
