"""How long a run is and how often it is repeated: the same for every row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One run reads a prompt and then decodes, greedily and at batch size 1, a sequence of tokens laid down beforehand.

    The tokens are forced, because a random model left to itself soon repeats one token for ever, which would flatter
    every cache; and because rounding differs among rows, which would send them different ways.
    """

    prompt_tokens: int = 16
    decode_tokens: int = 32
    """Measured, from the end of the prompt on."""
    runs: int = 5
    """With the page cache warm, and as many with it cold; the median counts. One unmeasured run comes before them."""
    seed: int = 0


QUICK = Protocol(prompt_tokens=4, decode_tokens=4, runs=1)
