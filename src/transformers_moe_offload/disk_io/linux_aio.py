"""Linux' asynchronous reads of files that are open past the page cache: io_submit(2), and what belongs to it.

Containers allow it, as a rule, where they forbid io_uring. The C library has no functions for it, so the system calls
are made by number. The structures are those of linux/aio_abi.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import weakref
from collections.abc import Callable
from functools import cache

CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4), "riscv64": (0, 1, 2, 4)}
"""Numbers of io_setup, io_destroy, io_submit and io_getevents, by machine."""


class AsyncReads:
    """A context that reads are submitted to. Raises `OSError` where the system does not grant one."""

    def __init__(self, most: int) -> None:
        """`most` reads may be in flight at once."""
        if sys.platform != "linux" or platform.machine() not in CALLS or sys.maxsize < 1 << 32:
            raise OSError(f"no system calls are known for {sys.platform} on {platform.machine()}")
        setup, destroy, self._submit, self._get_events = CALLS[platform.machine()]
        self._most = most
        self._context = ctypes.c_ulong(0)
        _call(setup, ctypes.c_long(most), ctypes.byref(self._context))
        self.close: Callable[[], object] = weakref.finalize(self, _destroy, destroy, self._context)
        """Wait for reads in flight, and end the context. Also called when the last reference to this object is gone."""
        self._read = _Read(operation=0)
        self._batch = (ctypes.c_void_p * 1)(ctypes.addressof(self._read))
        self._ended = (_Ended * most)()

    def submit(self, key: int, descriptor: int, offset: int, address: int, nbytes: int) -> None:
        """Begin to read. Raises `OSError` if the system refuses to."""
        read = self._read  # the kernel takes a copy
        read.key, read.descriptor, read.offset, read.address, read.nbytes = key, descriptor, offset, address, nbytes
        _call(self._submit, self._context, ctypes.c_long(1), self._batch)

    def ended(self, at_least: int) -> list[tuple[int, int]]:
        """Wait until `at_least` reads have ended; return their keys, and the bytes read or an error below zero.

        Each read is returned once.
        """
        timeout = None if at_least else ctypes.byref(_AT_ONCE)
        least, most = ctypes.c_long(at_least), ctypes.c_long(self._most)
        while True:
            try:
                number = _call(self._get_events, self._context, least, most, self._ended, timeout)
            except InterruptedError:
                continue
            return [(one.key, one.result) for one in self._ended[:number]]


class _Read(ctypes.Structure):
    """`struct iocb`, of a little-endian machine."""

    _fields_ = (
        ("key", ctypes.c_uint64),
        ("_reserved", ctypes.c_uint64),
        ("operation", ctypes.c_uint16),
        ("_priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("_reserved_too", ctypes.c_uint64),
        ("_flags", ctypes.c_uint32),
        ("_event", ctypes.c_uint32),
    )


class _Ended(ctypes.Structure):
    """`struct io_event`."""

    _fields_ = (
        ("key", ctypes.c_uint64),
        ("_read", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("_result_too", ctypes.c_int64),
    )


class _Time(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_AT_ONCE = _Time(0, 0)


def _destroy(number: int, context: ctypes.c_ulong) -> None:
    with contextlib.suppress(OSError):  # a process that was forked from this one has no such context
        _call(number, context)


@cache
def _system_call() -> Callable[..., int]:
    """The C library's syscall(2), made without the interpreter's lock."""
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def _call(number: int, *arguments: object) -> int:
    """Make a system call; returns its result, or raises `OSError`."""
    result = _system_call()(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)
