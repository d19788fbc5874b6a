"""The sizes of the made model and what follows from them. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

BFLOAT16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen3-MoE in bfloat16. The defaults have 2.25 GiB of experts, of which a token uses an eighth."""

    hidden: int = 1024
    intermediate: int = 768
    """Of one expert."""
    layers: int = 16
    """All of them sparse."""
    experts: int = 32
    """Per layer."""
    experts_per_token: int = 4
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 32_000
    embedding_std: float = 1.0
    """How much of the residual stream is the token's own embedding.

    With 1 routing is close to uniform, the worst case for a cache: it hits about as often as experts are in it.
    With Transformers' 0.02 the attention's average over the context drowns the token, every one is routed much like the
    one before, and most experts are hit.
    """
    popularity: float = 0.0
    """How much more some experts are chosen than others, as the spread of a bias of the router's logits over their own.

    0 is uniform, the worst case for a cache. With 0.7 an LRU cache of 25 % and 50 % of 64 experts, 8 chosen, hits 50 %
    and 80 % of the time (16 layers, hidden size 1024, 150 tokens), as OLMoE was measured to (51 % and 80 %: colibri,
    issues 1092 and 1050). The bias is all the locality there is: unlike in text, what a token takes says nothing about
    the next one, and five beams take as many experts as five unrelated tokens.
    """
    is_tied: bool = True
    """Whether the output embedding is the input embedding, or else a matrix of its own with the same weights."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Tells made models of different shapes apart; their folder is called so."""
        return (
            f"qwen3-moe-h{self.hidden}-i{self.intermediate}-l{self.layers}-e{self.experts}-k{self.experts_per_token}"
            f"-v{self.vocab}-d{self.embedding_std:g}{f'-p{self.popularity:g}' if self.popularity else ''}"
            f"{'' if self.is_tied else '-untied'}-s{self.seed}"
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.intermediate * BFLOAT16_BYTES

    @property
    def layer_bytes(self) -> int:
        """Bytes of all experts of a layer: what is fetched by whoever fetches a layer's tensors whole."""
        return self.experts * self.expert_bytes

    @property
    def all_expert_bytes(self) -> int:
        """Bytes of all experts."""
        return self.layers * self.layer_bytes


OLMOE = Shape(intermediate=512, experts=64, experts_per_token=8, popularity=0.7)
"""Shaped like OLMoE-1B-7B: its experts, choices, layers, half its widths, and hit rates like its own; 3 GiB."""

QUICK = Shape(
    hidden=64, intermediate=32, layers=2, experts=8, experts_per_token=2, heads=4, kv_heads=2, head_dim=16, vocab=256
)
"""Small enough to run through every line in seconds; its figures mean nothing."""

QUICK_OLMOE = replace(QUICK, experts=16, experts_per_token=4, popularity=0.7)

TRAINED = Shape(intermediate=512, layers=6, experts=64, experts_per_token=8, vocab=4096, popularity=0.7)
"""Expert-heavy, to be trained: 1.125 GiB of experts beside 38 MiB of everything else."""

QUICK_TRAINED = replace(QUICK, layers=3, experts=16, experts_per_token=4, popularity=0.7)
