"""The arithmetic of all experts that some pairs need, by their records' addresses: two products, and an activation
between them.

`mlp.py` says what one expert computes; here every step is one launch for all of them.
"""

# T tokens, K experts per token, P pairs, H hidden

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from transformers_moe_offload.compute.mlp import ExpertMlp
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
