"""Pairs of a dense model and a container that look equivalent and are not, and why each is refused.

Found by comparing logits: n copies of the dense model's blocks as experts have to give the dense model's logits, and
with these pairs they do not.
"""

from __future__ import annotations

_MULTIPLIERS = (
    "granite scales embeddings, attention, residuals and logits by factors of its own, which a llama does not have"
)

PAIRS = {
    ("olmo2", "olmoe"): "olmo2 has its norms after attention and block, olmoe before",
    ("olmo3", "flex_olmo"): "some of its layers attend to a window, and flex_olmo's do not",
    ("glm4", "glm4_moe"): "glm4 has norms after attention and block that glm4_moe does not have",
    ("phi3", "phimoe"): "phi3 has RMS norms, phimoe layer norms with biases",
    ("llama", "granitemoe"): _MULTIPLIERS,
    ("llama", "granitemoeshared"): _MULTIPLIERS,
    ("llama", "minimax_m2"): "minimax_m2 has norms on queries and keys, llama has none",
    ("llama", "qwen3_moe"): "qwen3_moe has norms on queries and keys, llama has none",
    ("llama", "afmoe"): "afmoe has norms on queries and keys and a gate on attention, llama has none",
    ("llama", "ernie4_5_moe"): "rotary embeddings turn neighbours in ernie4_5_moe and halves of a head in llama",
    ("smollm3", "mixtral"): "smollm3 leaves the rotary embedding out in every fourth layer, mixtral in none",
}
