"""Register our LoRA in PEFT's table of methods, and unregister it.

`PEFT_TYPE_TO_TUNER_MAPPING` (PEFT 0.21, `mapping.py`) says which class injects the adapters of a method. Ours only
differs from PEFT's for offloaded experts, so other models are not affected. Not needed once PEFT asks a module how its
parameters are adapted.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

from transformers_moe_offload.hf import upstream

logger = logging.getLogger(__name__)

OLDEST = "0.21.0"
"""The first PEFT with the parameter wrappers that ours derives from."""


def install_adapters() -> None:
    """Enable LoRA on offloaded experts if PEFT is installed; idempotent."""
    if find_spec("peft") is None:
        return
    if not upstream.is_peft_greater_or_equal(OLDEST):
        logger.warning(
            f"the PEFT that is installed is older than {OLDEST}, so adapters will not reach offloaded experts"
        )
        return
    from peft import PeftType

    from transformers_moe_offload.hf.peft.lora import LoraModel

    upstream.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel


def uninstall_adapters() -> None:
    """Restore PEFT's own entry."""
    if "peft" not in sys.modules:
        return
    from peft import LoraModel as Plain
    from peft import PeftType

    upstream.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Plain
