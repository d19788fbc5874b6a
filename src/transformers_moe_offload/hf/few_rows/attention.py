"""Attention, of the newest token of each text."""

# B texts, H hidden, N heads of queries, D columns of a head, 2 R rotated columns

from __future__ import annotations

from inspect import signature, unwrap
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from transformers_moe_offload.hf.few_rows.linear import FewRowsLinear
from transformers_moe_offload.hf.few_rows.norm import FewRowsNorm, norm_of
from transformers_moe_offload.hf.few_rows.swapped import FewRows, has_hooks
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.kernels.attention import MOST_TEXTS, Attention, AttentionKernel
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.few_rows import is_watched

_LINEARS, _NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")

_LOOKED_AT = frozenset(("hidden_states", "position_embeddings", "attention_mask", "cache", "past_key_values"))
_WITHOUT_EFFECT = _LOOKED_AT | {"position_ids", "cache_position", "use_cache", "logits_to_keep"}
"""Arguments that may have any value."""


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
        keys, values = _cache(kwargs).update(keys, values, module.layer_idx)
        return kernel.attend(queries, _as_rows(keys, hidden.dtype), _as_rows(values, hidden.dtype)), None


def _cache(kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _as_rows(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as the kernel takes them; a cache may keep others than it was given."""
    return kept if kept.dtype == dtype and kept.stride(-1) == 1 else kept.to(dtype).contiguous()


def _is_step(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the inputs are the newest token of each text, which attends to all tokens of its text."""
    if torch.compiler.is_compiling() or module.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    hidden, rotary_dims = kwargs.get("hidden_states"), module.how.rotary_dims
    if type(hidden) is not Tensor or not isinstance(_cache(kwargs), Cache) or not _is_plain(hidden):
        return False
    if hidden.dim() != 3 or hidden.shape[1] != 1 or not 0 < len(hidden) <= MOST_TEXTS:
        return False
    if kwargs.get("attention_mask") is not None or module.config._attn_implementation != "sdpa" or is_watched():
        return False
    if any(name not in _WITHOUT_EFFECT and not (value is None or value is False) for name, value in kwargs.items()):
        return False
    if not rotary_dims:
        return True
    turn = kwargs.get("position_embeddings")
    return isinstance(turn, tuple) and all(
        one.shape[:2] == hidden.shape[:2] and one.shape[2] in rotary_dims and _is_plain(one) for one in turn
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
                parts += (tensor.data_ptr(), tensor.dtype)
    made = _made.get(module)
    if made is None or made.parts != parts:
        made = _made[module] = _Made(parts, _make_kernel(module, dtype))
    return None if has_hooks(module._modules["q_proj"]) else made.kernel


def _make_kernel(module: Any, dtype: torch.dtype) -> AttentionKernel | None:
    linears = [module._modules[name] for name in _LINEARS]
    norms = [module._modules.get(name) for name in _NORMS]
    packed = [one for one in linears if type(one) is HqqLinear]
    if any(type(one) is not FewRowsLinear for one in linears if one not in packed):
        return None
    if len({one.activations for one in packed}) > 1:
        return None
    if any(one is not None and not isinstance(one, FewRowsNorm) for one in norms):
        return None
    plain = [one.weight for one in (*linears, *norms) if one is not None and one not in packed]
    if any(one.dtype != dtype for one in plain):
        return None
    tensors = [*plain, *(one.bias for one in linears), *(part for one in packed for part in one.matrix.parts.values())]
    if not all(one is None or (one.is_cpu and one.is_contiguous()) for one in tensors):
        return None
    return AttentionKernel(
        module.how,
        [(one.matrix if one in packed else one.weight, one.bias) for one in linears],
        [None if one is None else one.weight for one in norms],
        rounds=any(one.activations == "int8" for one in packed),
    )


def attention_of(module: Any) -> Attention | None:
    """How a layer attends, found by trying it on random weights and tokens; None if the kernels cannot do it."""
    children, config = module._modules, getattr(module, "config", None)
    head_dim, scaling = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    norms = [children.get(name) for name in _NORMS]
    if not {*_LINEARS} <= children.keys() <= {*_LINEARS, *_NORMS} or module._parameters or module._buffers:
        return None
    if not all(isinstance(children[name], nn.Linear) for name in _LINEARS):
        return None
    if not isinstance(head_dim, int) or not isinstance(scaling, float) or not hasattr(module, "layer_idx"):
        return None
    if getattr(config, "_attn_implementation", None) != "sdpa" or not _uses_known_names(type(module).forward):
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


_KNOWN = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "use_qk_norm", "apply_rotary_pos_emb", "force_rope")
    + ("head_dim", "scaling", "shape", "view", "transpose", "reshape", "contiguous", "layer_idx", "update")
    + ("ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward", "_attn_implementation", "config")
    + ("training", "attention_dropout", "sliding_window", "is_sliding", "getattr", "clip_qkv", "clamp_")
)
"""Names that a forward may use. One that uses others may look at positions, or choose tokens, as a trial would not show."""


def _uses_known_names(forward: Any) -> bool:
    code = getattr(unwrap(forward), "__code__", None)
    return code is not None and _KNOWN.issuperset(code.co_names)


_HIDDEN = 32
"""Inputs of the linear layers that a layer is tried with."""

_SIZES = (1.0, 30.0)
"""Of the random numbers. Large ones show whether a layer clips queries, keys or values."""


def _agrees(module: Any, attention: Attention, rotary_dim: int | None, size: float) -> bool:
    """Whether the kernels give what a layer gives, for three tokens of two texts."""
    random = torch.Generator().manual_seed(0)
    tried = _with_random_weights(module, random)
    children = tried._modules
    linears = [(children[name].weight, children[name].bias) for name in _LINEARS]
    weights = [children[name].weight if name in children else None for name in _NORMS]
    caches = DynamicCache(), DynamicCache()
    name = "cache" if "cache" in signature(unwrap(type(tried).forward)).parameters else "past_key_values"
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        kernel = AttentionKernel(attention, linears, weights)
        for _ in range(3):
            hidden = size * torch.randn(2, 1, _HIDDEN, generator=random)
            turn = torch.randn(2, 2, 1, rotary_dim or attention.head_dim, generator=random).unbind()
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
        plain_class = getattr(type(one), "plain_class", type(one))
        made = plain_class.__new__(plain_class)
        vars(made).update({**vars(one), "training": False, **contents})
        return made

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=random), requires_grad=False)

    children: dict[str, Any] = {}
    for name, child in module._modules.items():
        if name in _NORMS:
            children[name] = like(child, _parameters={"weight": parameter(*child.weight.shape)})
            continue
        inputs, outputs = child.in_features, child.out_features
        inputs, outputs = (inputs, _HIDDEN) if name == "o_proj" else (_HIDDEN, outputs)
        made = children[name] = nn.Linear(inputs, outputs, bias=child.bias is not None, device="meta")
        made.weight = nn.Parameter(parameter(outputs, inputs) / inputs**0.5, requires_grad=False)
        made.bias = None if child.bias is None else parameter(outputs)
    return like(module, _modules=children)
