"""Does Transformers load what was written, with nothing missing and nothing unexpected?

A small mixture is loaded as a user would load it, and its logits must be finite. For a large one, names, shapes and
conversions go through the same code, without the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from transformers_moe_offload.builder.checks import CheckFailedError
from transformers_moe_offload.builder.targets.base import few
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.tensor_files.index import StoredTensor
from transformers_moe_offload.untrusted import one_line

WHOLE_UP_TO = 256 * 2**20
"""Bytes of weights up to which the whole mixture is loaded: a build promises to need less than 1 GB."""

_TROUBLE = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")


def check_reload(folder: Path, stored: Mapping[str, StoredTensor], nbytes: int) -> bool:
    """Load the mixture, or raise `CheckFailedError`; returns whether the bytes were loaded, too."""
    is_small = nbytes <= WHOLE_UP_TO
    try:
        with _quiet():
            found = _whole(folder) if is_small else _names(folder, stored)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckFailedError(f"reload: Transformers cannot load the mixture: {one_line(error, 600)}") from error
    for kind in _TROUBLE:
        if found.get(kind):
            raise CheckFailedError(f"reload: {kind} {few(sorted(map(str, found[kind])))}")
    return is_small


@contextmanager
def _quiet() -> Iterator[None]:
    """Switches off the progress bar that Transformers shows for every model that it loads."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@torch.no_grad()
def _whole(folder: Path) -> dict[str, Any]:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    logits = model(input_ids=torch.arange(min(8, model.config.vocab_size))[None], use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise CheckFailedError("reload: the mixture's logits are not finite")
    return found


def _names(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    state = {name: torch.empty(one.shape, dtype=torch_dtype(one.dtype), device="meta") for name, one in stored.items()}
    with torch.device("meta"):
        cls = type(AutoModelForCausalLM.from_config(config))
    _, found = cls.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, device_map={"": "meta"}
    )
    return found
