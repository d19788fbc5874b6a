"""Give everything a model saves random values that keep its routing lively and its logits finite.

Upstream's own initialisation would not do: it draws most weights with a standard deviation of 0.02, which leaves every
router nearly undecided; seven architectures start router tensors at zero, and the experts of the qwen3_omni_moe talker
stay whatever `torch.empty` found in memory. Here all values come from one seed.
"""

import math
import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SMALLEST_STD = 0.02
LARGEST_STD = 0.2
"""Matrices get 1/sqrt(last axis), which keeps activations near one, within these bounds."""

VECTOR_STD = 0.05
"""Biases and norms. Below the spread of router scores: a correction bias may swing a choice but not make it alone."""

ZAYA_BIAS = -1.0
"""Transformers 5.23 writes this over the bias of zaya's skip expert on every load, so no other value would survive.

All experts get it, so that the skip expert competes on equal terms and some tokens do skip.
"""


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Overwrite all weights in place; the same seed gives the same values in every dtype, up to rounding.

    Each tensor ends in the dtype that `from_pretrained` would give it: models may keep some of them in float32.
    """
    dtype = model.dtype
    kept_in_float32 = tuple(model._get_dtype_plan(dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _saved_tensors(model):
            if name.endswith("tid2eid"):
                tensor.copy_(_distinct_experts(tensor.shape, model.config.num_local_experts, generator))
            elif name.endswith("balancing_biases"):
                tensor.fill_(ZAYA_BIAS)
            elif tensor.is_floating_point():
                values = _values(tensor, generator)
                tensor.data = values.float() if _matches(name, kept_in_float32) else values.to(tensor.dtype)


def _saved_tensors(model: nn.Module):
    """(name, tensor) of everything a checkpoint of the model holds, tied weights once."""
    buffers = dict(model.named_buffers())
    yield from model.named_parameters()
    yield from ((name, buffers[name]) for name in model.state_dict() if name in buffers)


def _values(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values around zero, or around one where the class starts from ones, as norms do."""
    centre = 1.0 if bool((tensor == 1).all()) else 0.0
    return centre + _std(tensor) * torch.randn(tensor.shape, generator=generator)


def _std(tensor: Tensor) -> float:
    if tensor.ndim < 2:
        return VECTOR_STD
    return min(max(1 / math.sqrt(tensor.shape[-1]), SMALLEST_STD), LARGEST_STD)


def _distinct_experts(shape: torch.Size, num_experts: int, generator: torch.Generator) -> Tensor:
    """(V, K) expert indices, no expert twice in a row: deepseek_v4 routes its hash layers by token id."""
    return torch.rand(shape[0], num_experts, generator=generator).argsort(dim=-1)[:, : shape[1]]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
