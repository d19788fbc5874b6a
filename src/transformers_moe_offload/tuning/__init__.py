"""Recommend the settings with which a model decodes fastest in so much RAM, by prediction and by trial."""

from transformers_moe_offload.tuning.search import tune
from transformers_moe_offload.tuning.settings import Candidate, Measured, Setting, Tuned

__all__ = ["Candidate", "Measured", "Setting", "Tuned", "tune"]
