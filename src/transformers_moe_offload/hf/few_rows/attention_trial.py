"""Whether the kernels compute what an attention layer computes, found by trying it."""

# B texts, H hidden, N heads of queries, D columns of a head, 2 R rotated columns

from __future__ import annotations

from collections.abc import Hashable
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from transformers_moe_offload.hf.few_rows.attention import LINEARS, NORMS
from transformers_moe_offload.hf.few_rows.norm import norm_of
from transformers_moe_offload.hf.upstream import attention_implementation, kv_cache_parameter
from transformers_moe_offload.kernels.attention import Attention, AttentionKernel


def attention_of(module: Any) -> Attention | None:
    """How a layer attends, found by trying it on random weights and tokens; None if the kernels cannot do it."""
    children, config = module._modules, getattr(module, "config", None)
    head_dim, scaling = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    norms = [children.get(name) for name in NORMS]
    if not {*LINEARS} <= children.keys() <= {*LINEARS, *NORMS} or module._parameters or module._buffers:
        return None
    if not all(isinstance(children[name], nn.Linear) for name in LINEARS):
        return None
    if not isinstance(head_dim, int) or not isinstance(scaling, float) or not hasattr(module, "layer_idx"):
        return None
    if attention_implementation(config) != "sdpa" or not _uses_known_names(type(module).forward):
        return None
    found = tuple(None if one is None else norm_of(one) for one in norms)
    if any(norm is None for norm, one in zip(found, norms, strict=True) if one is not None):
        return None
    attention = Attention(head_dim, (), scaling, found)  # type: ignore[arg-type]
    if all(_agrees(module, attention, None, size) for size in _SIZES):
        return attention
    rotary_dims = tuple(
        some
        for some in (head_dim, head_dim // 2, head_dim // 4)
        if all(_agrees(module, attention, some, size) for size in _SIZES)
    )
    return attention._replace(rotary_dims=rotary_dims) if rotary_dims else None


_KNOWN = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "use_qk_norm", "apply_rotary_pos_emb", "force_rope"),
    *("head_dim", "scaling", "shape", "view", "transpose", "reshape", "contiguous", "layer_idx", "update", "getattr"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward", "_attn_implementation", "config"),
    *("training", "attention_dropout", "sliding_window", "is_sliding", "clip_qkv", "clamp_"),
}
"""Names that a forward may use. One that uses others may look at positions or leave tokens out, which a trial of three
tokens would not show."""


def _uses_known_names(forward: Any) -> bool:
    code = getattr(unwrap(forward), "__code__", None)
    return code is not None and _KNOWN.issuperset(code.co_names)


def likeness(module: Any) -> Hashable:
    """What layers have in common that attend in the same way, if their forwards use known names: all but weights and
    their place in the model."""
    simple = [(name, one) for name, one in vars(module).items() if isinstance(one, int | float | str | None)]
    children = [
        (name, type(child), *(one.shape for one in child.parameters())) for name, child in module._modules.items()
    ]
    numbers = frozenset(item for item in simple if item[0] != "layer_idx")
    return type(module), id(getattr(module, "config", None)), numbers, tuple(children)


_HIDDEN = 32
"""Inputs of the linear layers that a layer is tried with."""

_SIZES = (1.0, 30.0)
"""Of the random numbers. Large ones show whether a layer clips queries, keys or values."""


def _agrees(module: Any, attention: Attention, rotary_dim: int | None, size: float) -> bool:
    """Whether the kernels give what a layer gives, for three tokens of two texts."""
    random = torch.Generator().manual_seed(0)
    tried = _with_random_weights(module, random)
    children = tried._modules
    linears = [(children[name].weight, children[name].bias) for name in LINEARS]
    weights = [children[name].weight if name in children else None for name in NORMS]
    caches = DynamicCache(), DynamicCache()
    name = kv_cache_parameter(type(tried).forward)
    if name is None:
        return False
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        kernel = AttentionKernel(attention, linears, weights)
        for _ in range(3):
            hidden = size * torch.randn(2, 1, _HIDDEN, generator=random)
            cos, sin = torch.randn(2, 2, 1, rotary_dim or attention.head_dim, generator=random)
            turn = cos, sin
            arguments = {"hidden_states": hidden, "position_embeddings": turn, "attention_mask": None}
            try:
                expected = tried.forward(**arguments, **{name: caches[0]})
            except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError):
                return False
            queries, keys, values = kernel.project(hidden, turn if rotary_dim else None)
            found = kernel.attend(queries, *caches[1].update(keys, values, tried.layer_idx))
            if not isinstance(expected, tuple) or len(expected) != 2 or expected[1] is not None:
                return False
            if expected[0].shape != found.shape or not torch.allclose(expected[0], found, 1e-4, 1e-4 * size):
                return False
    return True


def _with_random_weights(module: Any, random: torch.Generator) -> Any:
    """A layer like another, with few inputs and outputs, and random weights in float32."""

    def like(one: Any, **contents: Any) -> Any:
        plain_class: Any = getattr(type(one), "plain_class", type(one))
        made = plain_class.__new__(plain_class)
        vars(made).update({**vars(one), "training": False, **contents})
        return made

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=random), requires_grad=False)

    children: dict[str, Any] = {}
    for name, child in module._modules.items():
        if name in NORMS:
            children[name] = like(child, _parameters={"weight": parameter(*child.weight.shape)})
            continue
        inputs, outputs = child.in_features, child.out_features
        inputs, outputs = (inputs, _HIDDEN) if name == "o_proj" else (_HIDDEN, outputs)
        made: Any = nn.Linear(inputs, outputs, bias=child.bias is not None, device="meta")
        made.weight = nn.Parameter(parameter(outputs, inputs) / inputs**0.5, requires_grad=False)
        made.bias = None if child.bias is None else parameter(outputs)
        children[name] = made
    return like(module, _modules=children)
