"""Edits of a mixture: an expert is added, dropped or replaced, or the experts are merged into a dense model."""

from transformers_moe_offload.builder.edit.dense import merge_to_dense
from transformers_moe_offload.builder.edit.experts import add_expert, drop_expert, replace_expert

__all__ = ["add_expert", "drop_expert", "merge_to_dense", "replace_expert"]
