"""Matrices in the layout of the `hqq` package, 0.2.8: from it and to it, without that package.

There a matrix is a pair: the packed codes `W_q`, and a dictionary `meta` of what they mean. Codes lie group by group,
(M, g), and are packed along M. Bytes of 8, 4, 2 and 1 bits are the same as here as long as the codes in a byte divide
the rows; 3-bit codes are ten to an int32 there.

Values of `meta` may also be tensors, as `HQQLinear.state_dict` writes them for safetensors. Only those that tell
something are looked at, and nothing is ever evaluated.
"""

# N rows, K columns, g group size, M = N * K / g groups

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.config.formats import GROUP_SIZES, NBITS, HqqFormat
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.formats.hqq import in_half, packing_of
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing, pack, unpack
from transformers_moe_offload.kernels.reference import scales_and_zeros

PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
"""hqq's names, by bits of a code."""

IN_AN_INT32 = 10
"""3-bit codes; the first one in the highest of the lower 30 bits."""


def from_hqq(codes: Tensor, meta: Mapping[str, Any], *, name: str = "the matrix") -> PackedMatrix:
    """A matrix from hqq's `W_q` and `meta`. Scales and zeros are stored as float16: exact where they were.

    What hqq can express and this package cannot is a `CheckpointError`, in which the matrix is called `name`.
    """
    packing = _packing(meta, name)
    groups = packing.rows * packing.groups
    words = codes.detach()
    if _plain(meta, "view_as_float", name, default=False):
        words = words.contiguous().view(torch.int32 if packing.nbits == 3 else torch.uint8)
    in_a_word = IN_AN_INT32 if packing.nbits == 3 else 8 // packing.nbits
    wanted = (-(-groups // in_a_word), packing.group_size), torch.int32 if packing.nbits == 3 else torch.uint8
    if (tuple(words.shape), words.dtype) != wanted:
        raise CheckpointError(
            f"W_q of {name} is {words.dtype} of shape {tuple(words.shape)}; {packing.nbits}-bit codes of "
            f"{packing.rows} x {packing.cols} weights in groups of {packing.group_size} are {wanted[1]} of {wanted[0]}"
        )
    return PackedMatrix(packing, {**_codes_from(words, packing), **_meta_from(meta, packing, name)})


def to_hqq(matrix: PackedMatrix) -> tuple[Tensor, dict[str, Any]]:
    """hqq's `W_q` and `meta` of a matrix, scales and zeros as float32, from which hqq dequantizes the same weights."""
    packing = matrix.packing
    groups = packing.rows * packing.groups
    if packing.nbits != 3 and groups % (8 // packing.nbits):
        raise ConfigError(
            f"hqq packs {8 // packing.nbits} groups in a byte and cannot hold the {groups} groups of a matrix of "
            f"{packing.rows} x {packing.cols}; choose a group_size or nbits of which there is a multiple"
        )
    scale, zero = (values.view(-1, 1) for values in scales_and_zeros(matrix))
    return _codes_to(matrix), {
        "nbits": packing.nbits,
        "group_size": packing.group_size,
        "shape": torch.Size((packing.rows, packing.cols)),
        "scale": scale,
        "zero": zero,
        "axis": 1,
        "packing": PACKINGS[packing.nbits],
        "unpack_view_dtype": torch.int32 if packing.nbits == 3 else torch.uint8,
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": torch.float32,
    }


def _packing(meta: Mapping[str, Any], name: str) -> Packing:
    """How a matrix with this meta is packed here."""
    axis, nbits, group_size = (_plain(meta, key, name) for key in ("axis", "nbits", "group_size"))
    if axis != 1:
        raise CheckpointError(f"{name} has axis={axis}, groups along the outputs; only axis=1 can be used")
    if nbits not in NBITS:
        raise CheckpointError(f"{name} has {nbits} bits a code; only {', '.join(map(str, NBITS))} can be used")
    if group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"{name} has group_size={group_size}; only {', '.join(map(str, GROUP_SIZES))} can be used"
        )
    for key, quantized in (("quant_scale", "scale_q"), ("quant_zero", "zero_q")):
        if quantized in meta or _plain(meta, key, name, default=False):
            raise CheckpointError(
                f"{name} has {key}=True, or {quantized!r}: numbers that hqq quantized in turn; only plain ones "
                "can be used"
            )
    packing = _plain(meta, "packing", name)
    if packing != PACKINGS[nbits]:
        raise CheckpointError(f"{name} has packing={packing!r} for {nbits} bits a code; hqq writes {PACKINGS[nbits]!r}")
    shape = _plain(meta, "shape", name)
    if len(shape) != 2:
        raise CheckpointError(f"{name} has the shape {tuple(shape)}; a matrix has two dimensions")
    format = HqqFormat(nbits=nbits, group_size=group_size, meta_nbits=16)
    return packing_of(int(shape[0]), int(shape[1]), format, name=name)


def _plain(meta: Mapping[str, Any], key: str, name: str, *, default: Any = None) -> Any:
    """A value of `meta` as Python has it; required if there is no default."""
    value = meta.get(key, default)
    if value is None:
        raise CheckpointError(f"{name} has no {key!r} in its meta; it is not a matrix as hqq 0.2.8 writes it")
    if not isinstance(value, Tensor):
        return value
    if key == "packing":
        return bytes(value.tolist()).decode("ascii", "replace")
    return value.tolist()


def _meta_from(meta: Mapping[str, Any], packing: Packing, name: str) -> dict[str, Tensor]:
    parts = {}
    for key in ("scale", "zero"):
        values = meta.get(key)
        shape = (packing.rows, packing.groups)
        if not isinstance(values, Tensor) or values.numel() != packing.rows * packing.groups:
            found = tuple(values.shape) if isinstance(values, Tensor) else values
            raise CheckpointError(f"{key} of {name} is {found}; {packing.rows * packing.groups} groups need one each")
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{key} of {name} is infinite or not a number in places; the file is damaged")
        parts[key] = in_half(values.detach().float()).reshape(shape)
    return parts


def _codes_from(words: Tensor, packing: Packing) -> dict[str, Tensor]:
    """words as hqq packs them, int32 or uint8 -> the arrays of codes."""
    if packing.nbits == 3:
        fields = torch.stack([(words >> 3 * (IN_AN_INT32 - 1 - i)) & 7 for i in range(IN_AN_INT32)])
        groups = fields.view(-1, packing.group_size)[: packing.rows * packing.groups]
        return pack(groups.to(torch.uint8).reshape(packing.rows, packing.cols), packing)
    if _has_equal_bytes(packing):
        return {"codes": words.reshape(-1, packing.cols)}
    as_groups = _as_groups(packing)
    groups = unpack(PackedMatrix(as_groups, {"codes": words}))
    return pack(groups.view(packing.rows, packing.cols), packing)


def _codes_to(matrix: PackedMatrix) -> Tensor:
    """The codes of a matrix as hqq packs them."""
    packing = matrix.packing
    if _has_equal_bytes(packing):
        return matrix.parts["codes"].view(-1, packing.group_size)
    groups = unpack(matrix).view(-1, packing.group_size)
    if packing.nbits != 3:
        return pack(groups, _as_groups(packing))["codes"]
    fields = functional.pad(groups.int(), (0, 0, 0, -len(groups) % IN_AN_INT32))
    words = torch.zeros((len(fields) // IN_AN_INT32, packing.group_size), dtype=torch.int32, device=fields.device)
    for field in fields.view(IN_AN_INT32, *words.shape):
        words = words << 3 | field
    return words


def _has_equal_bytes(packing: Packing) -> bool:
    """Whether codes that share a byte there, a whole number of groups apart, are also a whole number of rows apart."""
    return packing.nbits != 3 and packing.rows % (8 // packing.nbits) == 0


def _as_groups(packing: Packing) -> Packing:
    """The matrix whose rows are the groups of another one."""
    return Packing(
        packing.rows * packing.groups, packing.group_size, packing.nbits, packing.group_size, packing.meta_nbits
    )
