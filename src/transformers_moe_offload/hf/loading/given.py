"""What the current call of `from_pretrained` or `save_pretrained` was given and Transformers does not pass on."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

import torch

from transformers_moe_offload.config import OffloadConfig

asked_for: ContextVar[OffloadConfig | None] = ContextVar("asked_for", default=None)
"""The config passed to the current `from_pretrained`. For a checkpoint with its own quantization config, Transformers
does not pass it on to the quantizer."""

to_save: ContextVar[Mapping[str, torch.Tensor] | None] = ContextVar("to_save", default=None)
"""The `state_dict` passed to the current `save_pretrained`; Transformers does not pass it on to the quantizer."""
