"""Tensors that raise when they are written to, because the values that they show are stored elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_OPERATORS = ("add", "and", "div", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
_WRITING = {"__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)}
"""Special methods of tensors that write: attributes such as `data`, entries, and operators such as `weight += ...`."""


class ReadOnlyTensor(Tensor):
    """A tensor, or a view of one, that cannot be changed. Results of computations with it are ordinary tensors."""

    @classmethod
    def refusal(cls) -> Exception:
        """The error for an attempt to write."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function that gets such a tensor as an argument."""
        given = dict(kwargs or {})
        if isinstance(_written(func.__name__, args, given), ReadOnlyTensor):
            raise cls.refusal()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **given)
        source = next((one for one in args if isinstance(one, cls)), None)
        if source is None:
            return result
        if isinstance(result, tuple | list):
            return type(result)(_guarded(one, source) for one in result)
        return _guarded(result, source)


def _written(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument that the torch function of this name writes to, if any."""
    if "out" in kwargs:
        return kwargs["out"]
    if not args:
        return None
    if function == "requires_grad_":  # freezing changes nothing
        is_frozen = not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
        return None if is_frozen else args[0]
    is_in_place = function.endswith("_") and not function.endswith("__")
    return args[0] if is_in_place or function in _WRITING else None


def _guarded(result: Any, source: Tensor) -> Any:
    """A result that shares the memory of `source` cannot be changed either."""
    if type(result) is not Tensor or result.device != source.device:
        return result
    is_view = result.untyped_storage()._cdata == source.untyped_storage()._cdata
    return result.as_subclass(type(source)) if is_view else result
