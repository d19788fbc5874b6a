"""Raise for calls that make the host wait for a value from a device.

A CUDA graph cannot capture such calls, because the host takes no part in a replay. On a CPU they would go unnoticed;
here they raise on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_moe_offload.errors import MoeOffloadError

_aten = torch.ops.aten

WAITING = frozenset(
    {
        _aten._local_scalar_dense.default,  # item, int(), float(), bool()
        _aten.is_nonzero.default,
        _aten.equal.default,
        _aten.allclose.default,
        _aten.nonzero.default,
        _aten.masked_select.default,
        _aten._unique2.default,
        _aten.unique_consecutive.default,
        _aten.unique_dim.default,
        _aten.bincount.default,
        _aten.repeat_interleave.Tensor,
    }
)
"""Operators whose result, or its size, is needed on the host."""

MASKED = frozenset(
    {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
)
"""Operators that count the entries of a mask first if an index is a mask."""

HANDED_OVER = frozenset({Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__})
"""Methods that give the host a tensor's values; for CPU tensors they dispatch no operator."""


class HostSyncError(MoeOffloadError, RuntimeError):
    """A call needs a value from a device on the host, which is not possible in a captured step."""


@contextmanager
def without_host() -> Iterator[None]:
    """Raise `HostSyncError` for every call that would wait for a GPU, whatever device this runs on."""
    with _NoValues(), _NoWaiting():
        yield


class _NoWaiting(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: `torch.compile` compiles under this mode and runs its kernels; otherwise it would not compile."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in WAITING or (func in MASKED and any(_is_mask(index) for index in args[1])):
            raise HostSyncError(f"{func} makes the host wait for a value")
        return func(*args, **(kwargs or {}))


class _NoValues(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in HANDED_OVER:
            raise HostSyncError(f"Tensor.{func.__name__} copies values to the host")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
