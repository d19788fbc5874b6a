"""One forward of a model: its tokens, which of them are padding, and which texts it goes on with."""

# B sequences, S their length

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformers_moe_offload.routing.moved_rows import Move


class Past:
    """Identifies the texts that one KV cache holds, without keeping the cache alive."""

    def __init__(self) -> None:
        self.moves: tuple[Move, ...] = ()
        """How its rows have been moved since the last forward."""
        self.num_kept: int | None = None
        """The fewest tokens of each text that the cache has held since then; None before any was noted."""

    def keep(self, num_tokens: int) -> None:
        """Note how many tokens of each text the cache holds now."""
        self.num_kept = num_tokens if self.num_kept is None else min(self.num_kept, num_tokens)


class Forward:
    """One forward, or the time before the first."""

    def __init__(self, number: int = -1) -> None:
        self.number = number
        self.is_running = False
        self.has_gradients = False
        """Whether its layers may be computed again for gradients."""
        self.inputs: dict[str, Any] = {}
        """Its arguments by name, while it runs."""
        self.token_ids: Tensor | None = None
        """(B, S) int64: the tokens embedded last; None where it was not given tokens."""
        self.is_padding: Tensor | None = None
        """(B, S) bool: which of `token_ids` are padding; None where there is no padding, or no listener."""
        self.is_encoding = self.has_encoded = False
        """Whether `token_ids` are those of the encoder inside an encoder-decoder model, a text of its own."""
        self.past = Past()
        """Identifies the texts: the same object in all forwards that continue them, in any thread."""
        self.moves: tuple[Move, ...] = ()
        """How the rows of those texts have been moved between the last forward that read them and this one."""
        self.num_before: int | None = 0
        """Tokens of each text that earlier forwards have read; None if the KV cache does not say."""
        self.num_kept = 0
        """How many of those have stayed in the KV cache since the last forward that read it; the others were dropped
        and read again."""

    def encoded(self) -> None:
        """The encoder is done: drop its tokens, because the decoder may be given embeddings instead of tokens."""
        self.token_ids = self.is_padding = None
        self.is_encoding, self.has_encoded = False, True
