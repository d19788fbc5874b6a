"""The state of a model, besides its inputs, that a captured step depends on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from transformers_moe_offload.hf.model.forward_hooks import announcing
from transformers_moe_offload.hf.upstream import OWN_HOOKS, attention_implementation, is_hooked_by_accelerate


class Capturable:
    """The owner of hooks whose effect may be captured with a step: work on the device, nothing that a replay skips."""

    @property
    def captured_as(self) -> Hashable | None:
        """What a captured step holds of it; None if a replay would skip something now."""
        raise NotImplementedError


def state_of(model: Any) -> Hashable:
    """A key that is equal as long as a captured step matches the model.

    Includes the addresses of weights, not their values: each replay reads them again.
    """
    owners = (getattr(hook, "__self__", None) for module in model.modules() for hook in _hooks(module))
    tensors = chain(model.parameters(), model.buffers())
    return (
        tuple((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device) for tensor in tensors),
        tuple((id(module), module.training) for module in model.modules()),
        tuple(sorted(_attention(model.config))),
        tuple(owner.captured_as for owner in owners if isinstance(owner, Capturable)),
    )


def watched(model: Any) -> str | None:
    """Why a graph replay of this model would skip Python side effects (hooks, adapters); None if it would not."""
    if model.training:
        return "the model is in training mode"
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    for name, module in model.named_modules():
        if "base_layer" in module._modules:
            return f"{name} has an adapter"
        if is_hooked_by_accelerate(module):
            return f"accelerate has a hook on {name or type(module).__name__}"
        for hook in _hooks(module):
            owner = getattr(hook, "__self__", None)
            is_captured = isinstance(owner, Capturable) and owner.captured_as is not None
            if not is_captured and not getattr(hook, "__module__", "").startswith((OWN_HOOKS, _TRACING)):
                return f"{name or type(module).__name__} has a hook, {getattr(hook, '__qualname__', hook)}"
    return None


_TRACING = announcing.__module__
"""The module of the hooks that report forwards to a trace. While one records, `Decoding.obstacle` prevents captures."""


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _attention(config: Any) -> Iterator[tuple[str, str]]:
    """The attention implementation of each part of a config: it can change between two generations."""
    yield "", str(attention_implementation(config))
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            yield name, str(attention_implementation(part))
