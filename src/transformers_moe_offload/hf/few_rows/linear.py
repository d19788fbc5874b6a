"""Linear layers."""

# K inputs, N outputs

from __future__ import annotations

from torch import Tensor, nn

from transformers_moe_offload.hf.few_rows.swapped import FewRows
from transformers_moe_offload.kernels.few_rows import MOST_ROWS, linear, takes


class FewRowsLinear(FewRows, nn.Linear):
    """A linear layer."""

    plain_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input (..., K) -> (..., N)."""
        if not self.training and 0 < input.numel() <= MOST_ROWS * self.in_features:
            weight, bias = self.weight, self.bias
            if takes(input, weight) and (bias is None or takes(input, bias)):
                return linear(input, weight, bias)
        return nn.Linear.forward(self, input)
