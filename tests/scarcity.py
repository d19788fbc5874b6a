"""Memory that runs out at a chosen allocation of ours."""

import mmap
import sys

import torch


class Scarce:
    """Counts what the package allocates, and refuses one of these allocations: number `at`, or none of them."""

    def __init__(self, monkeypatch, error=None):
        self.count = 0
        self.at = None
        self._error = error or MemoryError("can't allocate memory")
        for place, name in ((torch, "empty"), (torch, "zeros"), (mmap, "mmap")):
            monkeypatch.setattr(place, name, self._counted(getattr(place, name)))

    def _counted(self, allocate):
        def counted(*args, **kwargs):
            if sys._getframe(1).f_globals.get("__name__", "").startswith("transformers_moe_offload."):
                self.count += 1
                if self.count == self.at:
                    raise self._error
            return allocate(*args, **kwargs)

        return counted

    def refuse(self, at):
        """Refuse the so manieth allocation from now on."""
        self.count, self.at = 0, at
