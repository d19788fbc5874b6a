"""Hooks on modules, found again by the object whose methods they are.

Handles that torch returns do not survive copies of a model: `deepcopy`, and PEFT's `modules_to_save`, copy modules with
their hooks. The owner of a hook is copied with it, so all hooks of an owner can be found on the modules themselves.
Hooks rather than a swapped class or a replaced `forward`, because accelerate replaces `forward` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

Owner = TypeVar("Owner")


def before(module: nn.Module, method: Callable[..., Any]) -> None:
    """Call `method(module, args, kwargs)` before the module's forward."""
    module.register_forward_pre_hook(method, with_kwargs=True)


def after(module: nn.Module, method: Callable[..., Any]) -> None:
    """Call `method(module, args, kwargs, output)` after the module's forward; output is None where that failed."""
    module.register_forward_hook(method, with_kwargs=True, always_call=True)


def remove(base: nn.Module, owner: object) -> None:
    """Take out every hook inside `base` that is a method of `owner`."""
    for module in base.modules():
        for key in [key for key, hook in _hooks(module) if getattr(hook, "__self__", None) is owner]:
            for hooks in _dictionaries(module):
                hooks.pop(key, None)


def owners(base: nn.Module, kind: type[Owner]) -> list[Owner]:
    """The objects of a class whose methods are hooks inside `base`, each once, in the order of the modules."""
    hooks = (hook for module in base.modules() for _, hook in _hooks(module))
    found = (getattr(hook, "__self__", None) for hook in hooks)
    return list({id(owner): owner for owner in found if isinstance(owner, kind)}.values())


def _hooks(module: nn.Module) -> Iterator[tuple[int, Any]]:
    yield from module._forward_pre_hooks.items()
    yield from module._forward_hooks.items()


def _dictionaries(module: nn.Module) -> tuple[Any, ...]:
    return (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
