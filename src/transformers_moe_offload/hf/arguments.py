"""Arguments of Transformers' own methods: those that an offloaded model does not support, refused before anything is
done, and those that Transformers does not pass on to the quantizer.

All other arguments keep their meaning. `tests/hf/test_arguments.py` lists every argument of the methods that
`install.py` wraps, and how it is handled.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import ConfigError, UnsupportedModelError

asked_for: ContextVar[OffloadConfig | None] = ContextVar("asked_for", default=None)
"""The config passed to the current `from_pretrained`. For a checkpoint with its own quantization config, Transformers
does not pass it on to the quantizer."""

to_save: ContextVar[Mapping[str, torch.Tensor] | None] = ContextVar("to_save", default=None)
"""The `state_dict` passed to the current `save_pretrained`; Transformers does not pass it on to the quantizer."""


_SPLITS = {
    "tp_size": "tensor parallelism",
    "ep_size": "expert parallelism",
    "pp_size": "pipeline parallelism",
}
"""Sizes in a `DistributedConfig` (5.23, 5.24) that give each process a part of a sparse layer or of the model. With
tensor parallelism the plans reduce the output of every experts module over all processes, each of which would have
computed all of it; with expert parallelism every process keeps all experts. FSDP, which only splits dense weights, is
allowed."""


def refuse_on_load(arguments: Mapping[str, Any]) -> None:
    """Raise for keyword arguments of `from_pretrained` that offloading does not support."""
    if arguments.get("gguf_file") is not None:
        raise ConfigError(
            f"gguf_file={arguments['gguf_file']!r} is not supported with moe_offload, which reads experts from "
            f"safetensors files; load the checkpoint without it and save it with save_pretrained first"
        )
    refuse_splits(arguments.get("distributed_config"))
    refuse_splits({"tp_size": arguments.get("tp_size")})


def refuse_splits(distributed: Any) -> None:
    """Raise if a `DistributedConfig`, or a mapping like one, splits layers over processes."""
    sizes = distributed if isinstance(distributed, Mapping) else getattr(distributed, "__dict__", {})
    for name, kind in _SPLITS.items():
        if (sizes.get(name) or 1) > 1:
            raise UnsupportedModelError(
                f"{name}={sizes[name]} asks for {kind}, which offloaded experts do not support: every process computes "
                f"with all of them; leave it out, or load the model without moe_offload"
            )


def refuse_on_save(arguments: Mapping[str, Any], *, is_quantized: bool) -> None:
    """Raise for arguments of `save_pretrained` that an offloaded model does not support."""
    kind = "quantized" if is_quantized else "offloaded"
    for name in ("variant", "distributed_checkpoint") if is_quantized else ("distributed_checkpoint",):
        if arguments.get(name):
            raise ConfigError(f"{name}={arguments[name]!r} is not supported for {kind} experts; leave it out")
    if is_quantized and arguments.get("push_to_hub") and arguments.get("state_dict") is not None:
        raise ConfigError(
            "push_to_hub=True is not supported together with a state_dict for a model with quantized experts: its own "
            "weights would be pushed; save it without, and push the folder with `moe-offload push`"
        )
