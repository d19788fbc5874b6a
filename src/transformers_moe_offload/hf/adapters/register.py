"""Enter our LoRA into PEFT's table of methods, and take it out again.

`PEFT_TYPE_TO_TUNER_MAPPING` (PEFT 0.21, `mapping.py`) says which class injects the adapters of a method. Ours is PEFT's
own but for offloaded experts, so other models do not notice. It can go when PEFT asks a module how its parameters are
to be adapted.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

logger = logging.getLogger(__name__)

OLDEST = Version("0.21")
"""The first PEFT whose wrappers of parameters are what ours builds on."""


def install_adapters() -> None:
    """Make LoRA on offloaded experts possible, if PEFT is there; twice does no harm."""
    if find_spec("peft") is None:
        return
    if Version(version("peft")) < OLDEST:
        logger.info(f"PEFT {version('peft')} cannot adapt offloaded experts; {OLDEST} or later can")
        return
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType

    from transformers_moe_offload.hf.adapters.lora import LoraModel

    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel


def uninstall_adapters() -> None:
    """Leave PEFT as it was."""
    import sys

    if "peft" not in sys.modules:
        return
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
    from peft import LoraModel as Plain

    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = Plain
