"""Measure one answer while it is generated: speed and use of the cache."""

from __future__ import annotations

import time

from transformers_moe_offload.hf.model.handle import OffloadRuntime
from transformers_moe_offload.stats import CacheStats


class Meter:
    """Measures from its creation to each call of `summary`."""

    def __init__(self, runtime: OffloadRuntime) -> None:
        self._runtime = runtime
        runtime.reset_stats()
        self._started = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self.num_tokens = 0

    def count_token(self) -> None:
        """One more token has been generated."""
        self._last_s = time.perf_counter() - self._started
        self._first_s = self._first_s or self._last_s
        self.num_tokens += 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first one, which also took reading the prompt; 0 before the second."""
        decode_s = self._last_s - self._first_s
        return (self.num_tokens - 1) / decode_s if decode_s else 0.0

    def summary(self) -> str:
        """One line: tokens, speed, hit rate, bytes read."""
        stats: CacheStats = self._runtime.stats()
        return (
            f"{self.num_tokens} tokens, {self.tokens_per_s:.1f} tokens/s, first after {self._first_s:.1f} s, "
            f"hit rate {stats.hit_rate:.1%}, {stats.disk_bytes / 2**20:.1f} MiB read"
        )
