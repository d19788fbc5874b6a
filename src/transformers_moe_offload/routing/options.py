"""Checks that options of several strategies share."""

from __future__ import annotations

import math

from transformers_moe_offload.errors import ConfigError


def check_number(option: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    """Raise `ConfigError` unless the value is a finite number, above `above` and at least `least` where given."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (above is not None and value <= above) or (least is not None and value < least):  # type: ignore[operator]
        bound = f" above {above:g}" if above is not None else f" of at least {least:g}" if least is not None else ""
        raise ConfigError(f"{option}={value!r} is not a number{bound}")


def check_count(option: str, value: object, *, least: int = 1) -> None:
    """Raise `ConfigError` unless the value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{option}={value!r} is not an integer of at least {least}")


def check_seed(value: object) -> None:
    """Raise `ConfigError` unless the value is a seed: an integer of at least 0."""
    check_count("seed", value, least=0)


def check_fits(option: str, count: int, layer: int, num_experts: int) -> None:
    """Raise `ConfigError` for more experts than a router has."""
    if count > num_experts:
        raise ConfigError(
            f"{option}={count}, but router {layer} has {num_experts} experts; choose {num_experts} or fewer"
        )
