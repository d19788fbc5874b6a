"""Which channels of one feed-forward block go into which part, when it is split into experts."""

from transformers_moe_offload.builder.channel_split.parts import (
    co_activation_parts,
    k_means_parts,
    random_parts,
    sizes_of,
)
from transformers_moe_offload.builder.channel_split.split import channels_of

__all__ = ["channels_of", "co_activation_parts", "k_means_parts", "random_parts", "sizes_of"]
