"""Attention, of the newest token of each text."""

# B texts, H hidden, N heads of queries, D columns of a head, 2 R rotated columns

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers import Cache

from transformers_moe_offload.hf.few_rows.kept_tokens import extended
from transformers_moe_offload.hf.few_rows.linear import FewRowsLinear
from transformers_moe_offload.hf.few_rows.norm import FewRowsNorm
from transformers_moe_offload.hf.few_rows.swapped import FewRows
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.hf.upstream import ATTENTION_IMPLEMENTATION
from transformers_moe_offload.kernels.attention import MOST_TEXTS, Attention, AttentionKernel
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.few_rows import is_watched

LINEARS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
"""Names of the modules inside, in the order in which the kernel takes them; there may be no norms."""

_ARGUMENTS = frozenset(
    ["hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache_position", "use_cache"]
)
"""What is looked at, or has no effect; anything else but the KV cache must be missing, None or False."""


class _Made(NamedTuple):
    """The kernel of a layer, and what it was made of."""

    parts: list[Any]
    kernel: AttentionKernel | None
    """None if kernels do not take these weights."""


_made: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()


class FewRowsAttention(FewRows):
    """Mixed into the class of an attention layer."""

    how: Attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (B, 1, H) -> (B, 1, H) and None, as the layer's own forward by "sdpa"; else that one runs."""
        module: Any = self
        kernel = _kernel_for(module, kwargs) if not args and _is_step(module, kwargs) else None
        if kernel is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden, turn = kwargs["hidden_states"], kwargs["position_embeddings"] if module.how.rotary_dims else None
        queries, keys, values = kernel.project(hidden, turn)
        cache = _cache(kwargs)
        assert cache is not None
        keys, values = extended(cache, keys, values, module.layer_idx)
        return kernel.attend(queries, _as_rows(keys, hidden.dtype), _as_rows(values, hidden.dtype)), None


def _cache(kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def _as_rows(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as the kernel takes them; a cache may keep others than it was given."""
    return kept if kept.dtype == dtype and kept.stride(-1) == 1 else kept.to(dtype).contiguous()


def _is_step(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the inputs are the newest token of each text, which attends to all tokens of its text."""
    if torch.compiler.is_compiling() or module.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:  # they are called for the linear layers inside
        return False
    hidden, rotary_dims = kwargs.get("hidden_states"), module.how.rotary_dims
    if type(hidden) is not Tensor or not _is_plain(hidden):
        return False
    if hidden.dim() != 3 or hidden.shape[1] != 1 or not 0 < len(hidden) <= MOST_TEXTS:
        return False
    if getattr(module.config, ATTENTION_IMPLEMENTATION, None) != "sdpa" or is_watched():
        return False
    if kwargs.get("attention_mask") is not None:
        return False
    others = [
        value for name, value in kwargs.items() if name not in _ARGUMENTS and value is not None and value is not False
    ]
    if len(others) != 1 or not isinstance(others[0], Cache):
        return False
    if not rotary_dims:
        return True
    turn = kwargs.get("position_embeddings")
    return isinstance(turn, tuple) and all(
        one.shape[0] in (1, len(hidden)) and one.shape[1] == 1 and one.shape[2] in rotary_dims and _is_plain(one)
        for one in turn
    )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in TYPES


def _kernel_for(module: Any, kwargs: dict[str, Any]) -> AttentionKernel | None:
    """The kernel of a layer's weights as they are now; None if there is none, or its linear layers and norms have to be
    called."""
    dtype = kwargs["hidden_states"].dtype
    parts = [dtype]
    for child in module._modules.values():
        if child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
            return None
        parts += (type(child), vars(child).get("activations"))
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None:
                if type(tensor) not in (nn.Parameter, Tensor):
                    return None
                parts += (tensor.data_ptr(), tensor.dtype, tensor.shape)
    made = _made.get(module)
    if made is None or made.parts != parts:
        made = _made[module] = _Made(parts, _make_kernel(module, dtype))
    return made.kernel


def _make_kernel(module: Any, dtype: torch.dtype) -> AttentionKernel | None:
    linears = [module._modules[name] for name in LINEARS]
    norms = [module._modules.get(name) for name in NORMS]
    packed = [one for one in linears if type(one) is HqqLinear]
    if any(type(one) is not FewRowsLinear for one in linears if one not in packed):
        return None
    if len({one.activations for one in packed}) > 1:
        return None
    if any(one is not None and not isinstance(one, FewRowsNorm) for one in norms):
        return None
    plain = [one.weight for one in (*linears, *norms) if one is not None and one not in packed]
    biases = [one.bias for one in linears if one.bias is not None]
    if any(one.dtype != dtype for one in plain) or any(one.dtype not in TYPES for one in biases):
        return None
    tensors = [*plain, *biases, *(part for one in packed for part in one.matrix.parts.values())]
    if not all(one.is_cpu and one.is_contiguous() for one in tensors):
        return None
    return AttentionKernel(
        module.how,
        [(one.matrix if one in packed else one.weight, one.bias) for one in linears],
        [None if one is None else one.weight for one in norms],
        rounds=any(one.activations == "int8" for one in packed),
    )
