"""Recommend the settings with which a model decodes fastest in so much RAM, by prediction and by trial."""

from transformers_moe_offload.tuning.search import tune
from transformers_moe_offload.tuning.settings import Candidate, Setting, Tuned

__all__ = ["Candidate", "Setting", "Tuned", "tune"]
