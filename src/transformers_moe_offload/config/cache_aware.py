"""`CacheAwareConfig`: how strongly routers prefer experts that are resident."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.untrusted import quoted

STRONGEST = 1.0
"""By then every resident outranks every expert that is not, but for those that are protected."""


@dataclass(frozen=True, kw_only=True)
class CacheAwareConfig:
    """How strongly routers prefer experts that are resident, in steps of decoding.

    Results then depend on what is resident. `moe-offload tradeoff` measures what that costs and what it gains.

    Args:
        strength: what is added to a resident expert's score before the experts are chosen, as a share of the mean
            distance between a router's best and worst score; the first router adds half as much. 0 changes nothing; 1
            is the largest that makes sense.
        protect: so many experts that the router ranks highest are always chosen.
    """

    strength: float
    protect: int = 1

    def __post_init__(self) -> None:
        is_number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if not is_number or not math.isfinite(self.strength) or not 0 <= self.strength <= STRONGEST:
            raise ConfigError(
                f"strength={quoted(self.strength)} of cache_aware is not a number from 0, which changes nothing, to "
                f"{STRONGEST:g}, at which residents outrank all others; 0.1 is a good start"
            )
        if isinstance(self.protect, bool) or not isinstance(self.protect, int) or self.protect < 0:
            raise ConfigError(f"protect={quoted(self.protect)} of cache_aware is not a number of experts, 0 or more")
