"""A mixture that is there, with an expert more, one less, or another one; or as a dense model again."""

from transformers_moe_offload.builder.edit.dense import merge_to_dense
from transformers_moe_offload.builder.edit.experts import add_expert, drop_expert, replace_expert

__all__ = ["add_expert", "drop_expert", "merge_to_dense", "replace_expert"]
