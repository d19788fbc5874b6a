"""A memory budget as people write it: bytes, a size with its unit, or a share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.untrusted import quoted

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """A parsed memory budget: so many bytes, or a share of all experts, or `auto` when both are None."""

    nbytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, value: object, option: str) -> Budget:
        """Read `6442450944`, `"6GiB"`, `"6 GB"`, `"40%"` or `"auto"`; `option` is named in the error."""
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 < value < 2**63:
                raise ConfigError(f"{option}={quoted(value)} is not a positive number of bytes below 2**63")
            return cls(nbytes=value)
        if isinstance(value, str):
            text = value.strip().lower()
            if text == "auto":
                return cls()
            match = re.fullmatch(
                r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*|%)", text
            )  # 18 digits: every float of them is finite
            if match and match[2] == "%" and 0 < float(match[1]) <= 100:
                return cls(share=float(match[1]) / 100)
            if match and match[2] in _UNITS and int(float(match[1]) * _UNITS[match[2]]) > 0:
                return cls(nbytes=int(float(match[1]) * _UNITS[match[2]]))
        raise ConfigError(
            f"{option}={quoted(value)} is not a budget; write bytes as an int, a size such as '6GiB' or '500MB', "
            f"a share of all experts above '0%' and up to '100%', or 'auto'"
        )

    def resolve(self, all_experts: int, available: int) -> int:
        """The budget in bytes, given the bytes of all experts and the bytes `auto` may take."""
        if self.nbytes is not None:
            return self.nbytes
        if self.share is not None:
            return int(self.share * all_experts)
        return min(all_experts, available)
