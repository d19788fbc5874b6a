"""`PrefetchConfig`: how to load experts before a layer asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.untrusted import quoted


@dataclass(frozen=True, kw_only=True)
class PrefetchConfig:
    """How to load experts before a layer asks for them.

    Args:
        predictor: how to guess: `"next_router"` asks the routers of the layers ahead about the hidden states of this
            one, `"last_token"` expects what the layer wanted at the last token, `"transition"` learns which expert
            follows which; or a name given to `register_predictor`.
        lookahead: how many sparse layers ahead to guess, 1 to 4: the slower experts load, the earlier their loads must
            begin, and the less certain the guesses are.
        min_confidence: guesses that come true less often than this are not acted upon, 0 to 1.
        max_bytes: most bytes to start loading ahead during one sparse layer; None means what the measured bandwidth
            can carry in the time that demand leaves.
        adaptive: try now and then whether steps are faster with prefetching, and leave it off while they are not.
    """

    predictor: str = "next_router"
    lookahead: int = 1
    min_confidence: float = 0.5
    max_bytes: int | str | None = None
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, str):
            raise ConfigError(
                f"predictor={quoted(self.predictor)} is not the name of a predictor; register yours first"
            )
        if type(self.lookahead) is not int or not 1 <= self.lookahead <= 4:
            raise ConfigError(f"lookahead={quoted(self.lookahead)} is not a number of sparse layers from 1 to 4")
        confidence = self.min_confidence
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
            raise ConfigError(f"min_confidence={quoted(confidence)} is not a number from 0 to 1")
        if self.max_bytes is not None and Budget.parse(self.max_bytes, "max_bytes").nbytes is None:
            raise ConfigError(f"max_bytes={quoted(self.max_bytes)} is not a size such as '64MiB', or None")
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"adaptive={quoted(self.adaptive)} is not True or False")

    @property
    def max_nbytes(self) -> int | None:
        """`max_bytes`, parsed."""
        return None if self.max_bytes is None else Budget.parse(self.max_bytes, "max_bytes").nbytes
