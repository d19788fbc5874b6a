"""Check on random numbers that our arithmetic is as exact as that of a class of experts.

An experts class in Transformers may accumulate, gate or multiply in another precision than the flags of its decorator
say. So before our forward replaces a class's eager one, both compute the same small layer; if ours is further from the
float64 result, the class keeps its eager forward.
"""

# T tokens, K experts per token, E experts, S the size of everything else

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from transformers_moe_offload.compute.forward import combine
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.hf.model.lazy_experts import with_attributes
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.system.free_memory import is_out_of_memory

logger = logging.get_logger(__name__)

_TOKENS, _SIZE = 32, 32

_SLACK = 1.05
"""Our error may exceed the eager one by this factor: over 1024 random values the mean errors of two equally good orders
of summation differ by a few percent, while computing one step in a lower precision at least doubles the error."""


def reproduces(layer: SparseLayer, module: nn.Module, mlp: ExpertMlp) -> bool:
    """Whether `mlp`, combined as in `compute/forward.py`, is at least as exact as the module's eager forward."""
    try:
        return all(_is_as_exact(layer, module, mlp, dtype) for dtype in (torch.float32, torch.bfloat16))
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        # The class needs an attribute that this small copy lacks, such as a norm of its true size.
        logger.info(f"a small {layer.plain_class.__name__} could not be computed: {type(error).__name__}: {error}")
        return False


def _is_as_exact(layer: SparseLayer, module: nn.Module, mlp: ExpertMlp, dtype: torch.dtype) -> bool:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    num_experts = min(4, layer.num_experts)
    stacks = {field.name: 0.3 * draw(num_experts, *_shape(field.name, mlp)) for field in layer.fields}
    hidden = draw(_TOKENS, _SIZE)
    scores, index = draw(_TOKENS, num_experts).double().softmax(-1).topk(min(3, num_experts))
    weights = scores.to(dtype)

    def eager(dtype: torch.dtype) -> Tensor:
        copied = with_attributes(module, layer.plain_class, {name: stack.to(dtype) for name, stack in stacks.items()})
        return layer.eager_forward(copied, hidden.to(dtype), index, weights.to(dtype)).double()

    with torch.no_grad():
        exact = eager(torch.float64)
        eager_error = (eager(dtype) - exact).abs().mean()
        our_error = (_ours(mlp, module, stacks, hidden, index, weights).double() - exact).abs().mean()
        smallest = torch.finfo(dtype).eps * exact.abs().mean() / 8
    return bool(our_error <= _SLACK * eager_error + smallest)


def _shape(field: str, mlp: ExpertMlp) -> tuple[int, ...]:
    """The shape of a field of one expert in the small layer."""
    out = 2 * _SIZE if field.startswith("gate_up") else _SIZE
    if field.endswith("_bias"):
        return (out,)
    return (_SIZE, out) if mlp.is_transposed else (out, _SIZE)


def _ours(
    mlp: ExpertMlp, module: Any, stacks: dict[str, Tensor], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    grouping = group_by_expert(index, weights, len(stacks["down_proj"]))
    outputs = [
        mlp(module, hidden[tokens], {name: stack[expert] for name, stack in stacks.items()})
        for expert, tokens in grouping.tokens.items()
    ]
    return combine(outputs, grouping, hidden, weights)
