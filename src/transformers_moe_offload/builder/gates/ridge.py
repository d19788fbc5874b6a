"""Gates by ridge regression: the linear scores that come closest to 1 for an expert's own tokens and 0 for others'.

Closed form, as in DUME (arXiv 2603.29765): rows = b (A + lambda I)^-1 with A the second moment of the hidden states and
b their means by expert; -1 for an expert's negative prompts. Each expert's texts weigh the same.
"""

# E experts, H hidden

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.builder.gates.sums import Sums


def targets(sums: Sums) -> Tensor:
    """(E, H) float64: b, what the rows are fitted to."""
    mean = sums.mean
    return mean[::2] - mean[1::2]


def ridge_rows(second_moment: Tensor, targets: Tensor, regularization: float) -> Tensor:
    """The rows: second_moment (H, H), targets (E, H), float64 -> (E, H) float64.

    `regularization` is lambda as a share of the mean square of the hidden states.
    """
    hidden_size = second_moment.shape[0]
    penalty = regularization * second_moment.diagonal().mean()
    if penalty == 0:
        return torch.zeros_like(targets)
    regular = second_moment + penalty * torch.eye(hidden_size, dtype=second_moment.dtype)
    return torch.linalg.solve(regular, targets.T, left=True).T.contiguous()
