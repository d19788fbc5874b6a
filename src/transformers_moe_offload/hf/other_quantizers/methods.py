"""Quantization methods of others that are supported, and the errors for all others."""

from __future__ import annotations

from collections.abc import Iterable

from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.untrusted import quoted

DELEGATED = ("fp8", "mxfp8", "mxfp4")
"""The supported methods, by their names in Transformers, whose experts are decoded one by one with the method's own
code: block FP8, the same with scales that are powers of two, and MXFP4."""

_ADVICE = {
    "hqq": "quantize the original with `moe-offload quantize`, or, if it is in the layout of mixtral-offloading, "
    "convert it with `moe-offload convert`",
}
_HQQ_CODES = ".W_q"
"""Suffix of the names of codes in every layout of hqq."""


def refusal(name: object, method: str) -> ConfigError:
    """The error for a checkpoint, called `name`, of a method whose experts cannot be offloaded."""
    if method in DELEGATED:
        return ConfigError(
            f"{name} is quantized with {method!r}, which this version of Transformers does not know; install one that "
            f"does, or use an unquantized checkpoint of the model"
        )
    advice = _ADVICE.get(method, "load it without offloading, or use an unquantized checkpoint of the model")
    return ConfigError(
        f"{name} is already quantized with {quoted(method)}, whose experts cannot be offloaded (those of "
        f"{', '.join(DELEGATED)} can); {advice}"
    )


def refuse_hqq(names: Iterable[str], where: object) -> None:
    """Raise `CheckpointError` if one of these is a tensor of hqq's: loaded as a plain checkpoint, the model would lack
    half of its weights."""
    found = next((name for name in names if name.endswith(_HQQ_CODES)), None)
    if found is not None:
        raise CheckpointError(f"{where} holds {found}, codes of the hqq package, which are not read; {_ADVICE['hqq']}")
