"""The arithmetic of all experts that some pairs need, by their records' addresses: two products, and an activation
between them.

`mlp.py` says what one expert computes; here every step is one launch for all of them.
"""

# T tokens, K experts per token, P pairs, H hidden

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.kernels.grouped import Activation, Pairs, PlacedMatrix

if TYPE_CHECKING:
    from transformers_moe_offload.kernels.triton.grouped import Product


class ByAddress:
    """Computes with the experts of a layer where their records lie."""

    def __init__(
        self, mlp: ExpertMlp, first: PlacedMatrix, second: PlacedMatrix, activation: Activation | None = None
    ) -> None:
        """The matrices are those of `gate_up_proj` or `up_proj`, and of `down_proj`.

        `activation` is what the module does between them. If it is None, or no kernel can do it, the module does it.
        """
        self._mlp = mlp
        self._first = first
        self._second = second
        self._activation = activation if activation is not None and first.can_activate(activation) else None
        self._products: tuple[Product, Product] | None = None

    def __call__(self, experts: Any, rows: Tensor, pairs: Pairs) -> Tensor:
        """rows (P / choices, H) -> (P, H), not yet multiplied by the routing weights."""
        if self._products is None:  # not before: Triton takes a second to import
            from transformers_moe_offload.kernels.triton.grouped import Product

            self._products = Product(self._first, self._activation), Product(self._second)
        first, second = self._products
        hidden = first(rows, pairs)
        if self._activation is None:
            hidden = self._mlp.activate(experts, hidden)
        out = second(hidden, pairs._replace(choices=1))
        if self._mlp.has_post_expert_norm:
            normalised: Tensor = experts.post_expert_norm(out)
            return normalised
        return out


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
