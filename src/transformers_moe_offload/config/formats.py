"""`HqqFormat`: how the matrices of experts, or of dense layers, are quantized.

The arithmetic of the format is in `formats/hqq.py`. Method: Half-Quadratic Quantization (Badri and Shaji, 2023), as
the `hqq` package 0.2.8 computes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers_moe_offload.config.options import choose, refuse_unknown
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


def plain_format(value: HqqFormat | None) -> dict[str, Any] | None:
    """A format as JSON values."""
    return None if value is None else asdict(value)


def make_format(option: str, value: object) -> HqqFormat | None:
    """The format that an option stands for, given a format, a dictionary of its fields, or None."""
    if value is None or isinstance(value, HqqFormat):
        return value
    if isinstance(value, Mapping):
        refuse_unknown("HqqFormat", value, [f.name for f in fields(HqqFormat)])
        return HqqFormat(**value)
    raise ConfigError(f"{option}={quoted(value)} is not an HqqFormat, a dictionary of its fields, or None")
