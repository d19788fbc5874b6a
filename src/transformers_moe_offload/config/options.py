"""Checks of options that all configs share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.nearest import did_you_mean
from transformers_moe_offload.untrusted import parse_json, quoted

Config = TypeVar("Config")


def with_options(cls: type[Config], options: Mapping[str, Any]) -> Config:
    """A config with these options; an unknown one is an error that suggests the nearest."""
    refuse_unknown(cls.__name__, options, [f.name for f in fields(cls)])  # type: ignore[arg-type]
    return cls(**options)


def refuse_unknown(owner: str, options: Iterable[str], known: list[str]) -> None:
    """Raise `ConfigError` for the first option that is not known, with the nearest one that is."""
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known, otherwise=f"; options are {', '.join(known) or 'none at all'}")
            raise ConfigError(f"{owner} has no option {quoted(key)}{hint}")


def parsed(option: str, text: str) -> Any:
    """The value of a string of a command line: a JSON object, true, false or none in any case; else the string."""
    stripped = text.strip()
    words = {"true": True, "false": False, "none": None, "null": None}
    if stripped.lower() in words:
        return words[stripped.lower()]
    if not stripped.startswith("{"):
        return stripped
    try:
        return parse_json(stripped, "it", ConfigError)
    except ConfigError as error:
        raise ConfigError(
            f"{option}={quoted(text)}: {error}. Names and strings need double "
            "quotes, and the shell must leave them alone"
        ) from error


def choose(option: str, value: object, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ConfigError(f"{option}={quoted(value)} is not one of {list(choices)}")
