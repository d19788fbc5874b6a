"""Where the matrices of experts lie in their records, in the form that kernels that compute by address take."""

from __future__ import annotations

from collections.abc import Mapping

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.kernels.grouped import PlacedMatrix


def placed(
    mlp: ExpertMlp, arrays: Mapping[str, FieldSpec], places: Mapping[str, int], codec: ExpertCodec | None, name: str
) -> PlacedMatrix:
    """The matrix of a field, with its bias.

    `arrays` are those of a record by name, `places` the bytes into it at which they begin, and `codec` says how
    matrices are packed; None if they are not.
    """
    bias = f"{name}_bias"
    own_places = {"bias": places[bias]} if mlp.has_bias else {}
    bias_dtype = torch_dtype(arrays[bias].dtype) if mlp.has_bias else None
    packing = None if codec is None else codec.packing(name)
    if packing is not None:
        own_places |= {part.name: places[f"{name}.{part.name}"] for part in packing.parts}
        return PlacedMatrix(packing.rows, packing.cols, own_places, packing, bias_dtype=bias_dtype)
    shape = arrays[name].shape
    rows, cols = reversed(shape) if mlp.is_transposed else shape
    own_places["weight"] = places[name]
    dtype = torch_dtype(arrays[name].dtype)
    return PlacedMatrix(rows, cols, own_places, dtype=dtype, is_transposed=mlp.is_transposed, bias_dtype=bias_dtype)
