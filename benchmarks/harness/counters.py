"""What the kernel has counted for this process: bytes read and memory held. Linux only."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reads:
    """From `/proc/self/io` (man 5 proc), all threads together."""

    read_bytes: int
    """Fetched from the storage, page faults and readahead included."""
    rchar: int
    """Asked for with read and pread, whether or not the page cache had it; page faults do not count."""

    @classmethod
    def now(cls) -> Reads:
        """Since the process began."""
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return cls(int(fields["read_bytes"]), int(fields["rchar"]))

    def since(self, earlier: Reads) -> Reads:
        """What was read between two moments."""
        return Reads(self.read_bytes - earlier.read_bytes, self.rchar - earlier.rchar)

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.read_bytes + other.read_bytes, self.rchar + other.rchar)


def peak_rss() -> int:
    """Most bytes that were resident at once, mapped files included, since `forget_peak` or the start."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def forget_peak() -> None:
    """Let `peak_rss` start anew from what is resident now (man 5 proc, clear_refs 5, Linux 4.0).

    Some containers forbid it; the peak is then the one since the start, which can only be higher.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
