"""Enter our LoRA into PEFT's table of methods, and take it out again.

`PEFT_TYPE_TO_TUNER_MAPPING` (PEFT 0.21, `mapping.py`) says which class injects the adapters of a method. Ours is PEFT's
own but for offloaded experts, so other models do not notice. It can go when PEFT asks a module how its parameters are
to be adapted.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

from transformers_moe_offload.hf import upstream

logger = logging.getLogger(__name__)

OLDEST = "0.21.0"
"""The first PEFT whose wrappers of parameters are what ours builds on."""


def install_adapters() -> None:
    """Make LoRA on offloaded experts possible, if PEFT is there; twice does no harm."""
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
    """Leave PEFT as it was."""
    if "peft" not in sys.modules:
        return
    from peft import LoraModel as Plain
    from peft import PeftType

    upstream.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Plain
