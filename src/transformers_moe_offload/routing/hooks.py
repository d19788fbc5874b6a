"""Hooks on modules, found again by the object whose methods they are.

Handles that torch returns do not survive copies of a model: `deepcopy`, and PEFT's `modules_to_save`, copy modules with
their hooks. The owner of a hook is copied with it, so all hooks of an owner can be found on the modules themselves.
Hooks rather than a swapped class or a replaced `forward`, because accelerate replaces `forward` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class Hooks:
    """Adds hooks to modules of a model, and takes them out again."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base

    def before(self, module: nn.Module, method: Callable[..., Any]) -> None:
        """Call `method(module, args, kwargs)` before the module's forward."""
        module.register_forward_pre_hook(method, with_kwargs=True)

    def after(self, module: nn.Module, method: Callable[..., Any]) -> None:
        """Call `method(module, args, kwargs, output)` after the module's forward; output is None where that failed."""
        module.register_forward_hook(method, with_kwargs=True, always_call=True)

    def remove(self, owner: object) -> None:
        """Take out every hook that is a method of `owner`."""
        for module in self._base.modules():
            for key in [key for key, hook in _hooks(module) if getattr(hook, "__self__", None) is owner]:
                for hooks in _dictionaries(module):
                    hooks.pop(key, None)

    def owners(self, kind: type) -> Iterator[Any]:
        """The objects of a class whose methods are hooks here, each once, in the order of the modules."""
        found: dict[int, Any] = {}
        for module in self._base.modules():
            for _, hook in _hooks(module):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, kind):
                    found[id(owner)] = owner
        yield from found.values()


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
