"""Where the matrices of experts lie in their records, as the kernels that compute by address want to know it."""

from __future__ import annotations

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.formats.coding import ExpertCoding
from transformers_moe_offload.kernels.grouped import PlacedMatrix
from transformers_moe_offload.memory.record import RecordLayout, torch_dtype


def placed(mlp: ExpertMlp, layout: RecordLayout, coding: ExpertCoding | None, name: str) -> PlacedMatrix:
    """One of the matrices, with its bias; `coding` says how it is packed, None that it is not."""
    dtypes = {field.name: torch_dtype(field.dtype) for field in layout.fields}
    bias_dtype = dtypes[f"{name}_bias"] if mlp.has_bias else None
    bias = {"bias": layout.offsets[f"{name}_bias"]} if mlp.has_bias else {}
    packing = None if coding is None else coding.packing(name)
    if packing is not None:
        places = {part.name: layout.offsets[f"{name}.{part.name}"] for part in packing.parts}
        return PlacedMatrix(packing.rows, packing.cols, places | bias, packing, bias_dtype=bias_dtype)
    shape = next(field.shape for field in layout.fields if field.name == name)
    rows, cols = reversed(shape) if mlp.is_transposed else shape
    return PlacedMatrix(
        rows,
        cols,
        {"weight": layout.offsets[name]} | bias,
        dtype=dtypes[name],
        is_transposed=mlp.is_transposed,
        bias_dtype=bias_dtype,
    )
