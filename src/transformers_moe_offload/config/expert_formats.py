"""`ExpertFormats`: which experts are quantized how, by sparse layer and one by one.

Everything is named by number, so that a recipe says it all: who is hot was read from a trace beforehand
(`Trace.hottest`), and whoever loads the result needs no trace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers_moe_offload.config.formats import HqqFormat, make_format, plain_format
from transformers_moe_offload.config.options import with_options
from transformers_moe_offload.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExpertFormats:
    """Which experts are stored how.

    Args:
        default: the format of every layer that `layers` does not name; None leaves them as they are.
        layers: formats of single sparse layers, by their number in the order of the model, `"3"`, or by range,
            `"0-3"`, both ends included.
        hot: the format of the experts in `hot_experts`, whatever their layer's is; None leaves them as they are.
        hot_experts: numbers of single experts by sparse layer, with keys as in `layers`. `Trace.hottest` finds those
            that were used most.
    """

    default: HqqFormat | None = None
    layers: Mapping[str, HqqFormat | None] = field(default_factory=dict)
    hot: HqqFormat | None = None
    hot_experts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", make_format("default", self.default))
        object.__setattr__(self, "hot", make_format("hot", self.hot))
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers={self.layers!r} is not a dictionary of formats by layer")
        formats = {str(key): make_format(f"layers[{key!r}]", value) for key, value in self.layers.items()}
        object.__setattr__(self, "layers", formats)
        if not isinstance(self.hot_experts, Mapping):
            raise ConfigError(f"hot_experts={self.hot_experts!r} is not a dictionary of numbers of experts by layer")
        experts = {str(key): _experts(f"hot_experts[{key!r}]", value) for key, value in self.hot_experts.items()}
        object.__setattr__(self, "hot_experts", {key: numbers for key, numbers in experts.items() if numbers})
        for option in ("layers", "hot_experts"):
            _expect_once(option, getattr(self, option))
        if self.hot is not None and not self.hot_experts:
            raise ConfigError(
                f"hot={self.hot}, but hot_experts names no experts; `Trace.hottest` finds those that were used most"
            )

    def __hash__(self) -> int:
        return hash((self.default, tuple(sorted(self._format_of.items())), self.hot, tuple(sorted(self._hot_of))))

    def __str__(self) -> str:
        others = "".join(f"; sparse layers {key}: {value or 'as they are'}" for key, value in self.layers.items())
        hot = f"; {self.num_hot} hot experts: {self.hot or 'as they are'}" if self.hot_experts else ""
        return f"{self.default or 'as they are'}{others}{hot}"

    @property
    def leaves_all_as_they_are(self) -> bool:
        """Whether no expert gets a format."""
        return self.default is None and self.hot is None and not any(self.layers.values())

    @property
    def num_hot(self) -> int:
        """Experts that `hot_experts` names."""
        return sum(len(experts) for experts in self._hot_of.values())

    def of_layer(self, number: int) -> HqqFormat | None:
        """The format of a sparse layer's experts, but for the hot ones."""
        return self._format_of.get(number, self.default)

    def hot_of_layer(self, number: int) -> frozenset[int]:
        """The experts of a sparse layer that are in the format `hot`."""
        return self._hot_of.get(number, frozenset())

    def as_stored(self) -> ExpertFormats:
        """The same but for `optimize`, as `HqqFormat.as_stored`."""
        layers = {key: value and value.as_stored() for key, value in self.layers.items()}
        return replace(
            self,
            default=self.default and self.default.as_stored(),
            layers=layers,
            hot=self.hot and self.hot.as_stored(),
        )

    def check(self, num_experts: Sequence[int]) -> None:
        """Raise `ConfigError` if a layer or an expert is named that the model does not have, given the experts of each
        of its sparse layers."""
        num_layers = len(num_experts)
        for option in ("layers", "hot_experts"):
            for key in getattr(self, option):
                if _numbers(option, key)[-1] >= num_layers:
                    raise ConfigError(
                        f"{option} names sparse layer {key!r}, but the model has {num_layers}, 0 to {num_layers - 1}"
                    )
        for layer, experts in self._hot_of.items():
            if max(experts) >= num_experts[layer]:
                raise ConfigError(
                    f"hot_experts names expert {max(experts)} of sparse layer {layer}, which has {num_experts[layer]}, "
                    f"0 to {num_experts[layer] - 1}; the trace may be of another model"
                )

    def plain(self) -> dict[str, Any]:
        """As JSON knows it; without hot experts, only what there is to say."""
        hot = {key: list(experts) for key, experts in self.hot_experts.items()}
        return {
            "default": plain_format(self.default),
            "layers": {key: plain_format(value) for key, value in self.layers.items()},
        } | ({"hot": plain_format(self.hot), "hot_experts": hot} if hot else {})

    @classmethod
    def make(cls, value: object) -> ExpertFormats | None:
        """What `experts=` stands for: one format for all, a dictionary of either class's fields, or None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, HqqFormat):
            return cls(default=value)
        if isinstance(value, Mapping):
            if {"default", "layers", "hot", "hot_experts"} & set(value):
                return with_options(cls, value)
            return cls(default=make_format("experts", value))
        raise ConfigError(f"experts={value!r} is not an HqqFormat, a dictionary of its fields, or None")

    @cached_property
    def _format_of(self) -> dict[int, HqqFormat | None]:
        return {number: value for key, value in self.layers.items() for number in _numbers("layers", key)}

    @cached_property
    def _hot_of(self) -> dict[int, frozenset[int]]:
        return {
            number: frozenset(experts)
            for key, experts in self.hot_experts.items()
            for number in _numbers("hot_experts", key)
        }


def _experts(option: str, value: object) -> tuple[int, ...]:
    """Numbers of experts, in order."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{option}={value!r} is not a list of numbers of experts")
    for number in value:
        if type(number) is not int or number < 0:
            raise ConfigError(f"{option} has {number!r}, which is not the number of an expert")
        if value.count(number) > 1:
            raise ConfigError(f"{option} names expert {number} twice")
    return tuple(sorted(value))


def _expect_once(option: str, keys: Mapping[str, object]) -> None:
    """Raise `ConfigError` if two keys name one layer."""
    seen: dict[int, str] = {}
    for key in keys:
        for number in _numbers(option, key):
            if number in seen:
                raise ConfigError(f"{option} names sparse layer {number} twice, in {seen[number]!r} and {key!r}")
            seen[number] = key


def _numbers(option: str, key: str) -> range:
    """The sparse layers that a key names."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", key)
    if not match or (match[2] and int(match[2]) < int(match[1])):
        raise ConfigError(f"{option} has {key!r}, which is not a layer's number such as '3' or a range such as '0-3'")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
