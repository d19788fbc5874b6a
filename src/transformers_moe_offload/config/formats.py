"""`HqqFormat`: how matrices are quantized, and `ExpertFormats`: which experts are quantized how.

The arithmetic of a format is in `formats/hqq.py`. Method: Half-Quadratic Quantization (Badri and Shaji, 2023), as
the `hqq` package 0.2.8 computes it.

Layers and experts are named by number, so that a recipe is complete: hot experts were read from a trace beforehand
(`Trace.hottest`, `RoutingTrace.hottest`), and no trace is needed to load the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers_moe_offload.config.options import choose, with_options
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.untrusted import quoted

NBITS = (8, 4, 3, 2, 1)
GROUP_SIZES = (16, 32, 64, 128)
META_NBITS = (16, 8)


@dataclass(frozen=True, kw_only=True)
class HqqFormat:
    """Weights as `nbits` integers, in groups along a matrix's input dimension that share a scale and a zero.

    A weight is `(code - zero) * scale`.

    Args:
        nbits: bits of a code: 8, 4, 3, 2 or 1.
        group_size: weights that share a scale and a zero: 16, 32, 64 or 128; it must divide the input dimension.
        axis: 1, groups along the input dimension; 0, along the outputs, is only read: `moe-offload convert` finds it in
            checkpoints that others have quantized. It has no arithmetic of its own, so experts are decoded at each use.
        meta_nbits: bits of a scale, and of a zero: 16 (float16), or 8, integers with a minimum and a step for each
            128 of them, which saves 15.5 / `group_size` bits per weight and costs next to no accuracy.
        optimize: fit zeros with hqq's solver; False rounds to nearest, which is faster and a little worse.
    """

    nbits: int = 4
    group_size: int = 64
    axis: int = 1
    meta_nbits: int = 8
    optimize: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("nbits", NBITS), ("group_size", GROUP_SIZES), ("meta_nbits", META_NBITS), ("axis", (1, 0)),
        ):  # fmt: skip
            if type(getattr(self, name)) is not int:  # True and 4.0 equal integers, but are not integers
                raise ConfigError(f"{name}={quoted(getattr(self, name))} is not one of {list(choices)}")
            choose(name, getattr(self, name), choices)
        if not isinstance(self.optimize, bool):
            raise ConfigError(f"optimize={quoted(self.optimize)} is not True or False")

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes on average, scales and zeros included."""
        of_meta = 32.0 if self.meta_nbits == 16 else 16 + 2 * 32 / 128
        return self.nbits + of_meta / self.group_size

    def __str__(self) -> str:
        meta = ", 16-bit scales" if self.meta_nbits == 16 else ""
        return f"{self.nbits}-bit, groups of {self.group_size}{'' if self.axis else ' along the outputs'}{meta}"

    def as_stored(self) -> HqqFormat:
        """The same with `optimize` at its default, because stored weights do not tell its value."""
        return replace(self, optimize=True)

    @classmethod
    def parse(cls, text: str) -> HqqFormat:
        """Read `4x64` (bits x group size), as the command line writes a format; `4x64m16` asks for 16-bit meta."""
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})(?:m([0-9]{1,4}))?", text.strip().lower())
        if not match:
            raise ConfigError(f"{quoted(text)} is not a format; write bits and group size such as 4x64, or 4x64m16")
        nbits, group_size, meta_nbits = int(match[1]), int(match[2]), int(match[3] or cls.meta_nbits)
        for what, number, choices in (
            ("the number of bits is", nbits, NBITS), ("a group size is", group_size, GROUP_SIZES),
            ("the number of bits of scales and zeros is", meta_nbits, META_NBITS),
        ):  # fmt: skip
            if number not in choices:
                raise ConfigError(f"{quoted(text)} is not a format: {what} one of {', '.join(map(str, choices))}")
        return cls(nbits=nbits, group_size=group_size, meta_nbits=meta_nbits)


def make_format(option: str, value: object) -> HqqFormat | None:
    """The format that an option stands for, given a format, a dictionary of its fields, or None."""
    if value is None or isinstance(value, HqqFormat):
        return value
    if isinstance(value, Mapping):
        return with_options(HqqFormat, value)
    raise ConfigError(f"{option}={quoted(value)} is not an HqqFormat, a dictionary of its fields, or None")


@dataclass(frozen=True, kw_only=True)
class ExpertFormats:
    """Which experts are stored how.

    Args:
        default: the format of every layer that `layers` does not name; None leaves them as they are.
        layers: formats of single sparse layers, by their number in the order of the model, `"3"`, or by range,
            `"0-3"`, both ends included.
        hot: the format of the experts in `hot_experts`, whatever their layer's is; None leaves them as they are.
        hot_experts: numbers of single experts by sparse layer, with keys as in `layers`. `Trace.hottest` and
            `RoutingTrace.hottest` find those that most tokens chose.
    """

    default: HqqFormat | None = None
    layers: Mapping[str, HqqFormat | None] = field(default_factory=dict)
    hot: HqqFormat | None = None
    hot_experts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", make_format("default", self.default))
        object.__setattr__(self, "hot", make_format("hot", self.hot))
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers={quoted(self.layers)} is not a dictionary of formats by layer")
        _expect_once("layers", self.layers)
        formats = {
            _key("layers", key): make_format(f"layers[{quoted(key)}]", value) for key, value in self.layers.items()
        }
        object.__setattr__(self, "layers", formats)
        if not isinstance(self.hot_experts, Mapping):
            raise ConfigError(
                f"hot_experts={quoted(self.hot_experts)} is not a dictionary of numbers of experts by layer"
            )
        _expect_once("hot_experts", self.hot_experts)
        experts = {
            _key("hot_experts", key): _experts(f"hot_experts[{quoted(key)}]", value)
            for key, value in self.hot_experts.items()
        }
        object.__setattr__(self, "hot_experts", {key: numbers for key, numbers in experts.items() if numbers})
        if self.hot is not None and not self.hot_experts:
            raise ConfigError(
                f"hot={self.hot}, but hot_experts names no experts; `Trace.hottest` finds those that were used most"
            )

    def __hash__(self) -> int:
        return hash((self.default, frozenset(self.layers.items()), self.hot, frozenset(self.hot_experts.items())))

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
        return sum((layers[-1] - layers[0] + 1) * len(experts) for layers, experts in self._hot_of)

    def of_layer(self, number: int) -> HqqFormat | None:
        """The format of a sparse layer's experts, but for the hot ones."""
        return next((value for layers, value in self._format_of if number in layers), self.default)

    def hot_of_layer(self, number: int) -> frozenset[int]:
        """The experts of a sparse layer that are in the format `hot`."""
        return next((experts for layers, experts in self._hot_of if number in layers), frozenset())

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
                        f"ExpertFormats.{option} names sparse layer {quoted(key)}, but the model has {num_layers}, "
                        f"0 to {num_layers - 1}"
                    )
        for layer, experts in ((layer, experts) for layers, experts in self._hot_of for layer in layers):
            if max(experts) >= num_experts[layer]:
                raise ConfigError(
                    f"ExpertFormats.hot_experts names expert {quoted(max(experts))} of sparse layer {layer}, which has "
                    f"{num_experts[layer]}, 0 to {num_experts[layer] - 1}; the trace may be of another model"
                )

    def plain(self) -> dict[str, Any]:
        """The fields as JSON values, `hot` and `hot_experts` only if there are hot experts."""
        hot = {key: list(experts) for key, experts in self.hot_experts.items()}
        return {
            "default": self.default and asdict(self.default),
            "layers": {key: value and asdict(value) for key, value in self.layers.items()},
        } | ({"hot": self.hot and asdict(self.hot), "hot_experts": hot} if hot else {})

    @classmethod
    def make(cls, value: object) -> ExpertFormats | None:
        """The formats that `experts=` stands for, given one format for all, a dictionary of either class's fields, or
        None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, HqqFormat):
            return cls(default=value)
        if isinstance(value, Mapping):
            if {"default", "layers", "hot", "hot_experts"} & set(value):
                return with_options(cls, value)
            return cls(default=make_format("experts", value))
        raise ConfigError(f"experts={quoted(value)} is not an HqqFormat, a dictionary of its fields, or None")

    # Ranges are never expanded into single layers: a key of an untrusted file may name any number of them.

    @cached_property
    def _format_of(self) -> list[tuple[range, HqqFormat | None]]:
        return [(_numbers("layers", key), value) for key, value in self.layers.items()]

    @cached_property
    def _hot_of(self) -> list[tuple[range, frozenset[int]]]:
        return [(_numbers("hot_experts", key), frozenset(experts)) for key, experts in self.hot_experts.items()]


def _key(option: str, key: object) -> str:
    """A layer's number, or a range of them, as the text that JSON has for it."""
    if isinstance(key, str):
        return key
    if type(key) is int and abs(key) < 10**9:
        return str(key)
    raise _no_layers(option, key)


def _experts(option: str, value: object) -> tuple[int, ...]:
    """Numbers of experts, in order."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{option}={quoted(value)} is not a list of numbers of experts")
    seen: set[int] = set()
    for number in value:
        if type(number) is not int or number < 0:
            raise ConfigError(f"{option} has {quoted(number)}, which is not the number of an expert")
        if number in seen:
            raise ConfigError(f"{option} names expert {quoted(number)} twice")
        seen.add(number)
    return tuple(sorted(seen))


def _expect_once(option: str, keys: Iterable[object]) -> None:
    """Raise `ConfigError` if two keys name one layer."""
    before = None
    by_layer = [(_numbers(option, _key(option, key)), key) for key in keys]
    for layers, key in sorted(by_layer, key=lambda one: (one[0][0], one[0][-1])):
        if before is not None and layers[0] <= before[0][-1]:
            raise ConfigError(
                f"ExpertFormats.{option} names sparse layer {layers[0]} twice, in {quoted(before[1])} and {quoted(key)}"
            )
        before = layers, key


def _numbers(option: str, key: str) -> range:
    """The sparse layers that a key names."""
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", key)  # nine digits: no model has that many layers
    if not match or (match[2] and int(match[2]) < int(match[1])):
        raise _no_layers(option, key)
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _no_layers(option: str, key: object) -> ConfigError:
    return ConfigError(
        f"ExpertFormats.{option} has {quoted(key)}, which is not a layer's number such as '3' or a range such as '0-3'"
    )
