"""A model without its weights: built on meta from its config, as loading would build it.

Asks for `config.json` and nothing else; what the checkpoint's index says about it is `stored.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from transformers_moe_offload.cli.failures import CommandError, reading
from transformers_moe_offload.cli.options import Origin
from transformers_moe_offload.cli.stored import Stored, what_is_stored
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.checkpoint import Checkpoint
from transformers_moe_offload.hf.delegates.methods import DELEGATED, refusal
from transformers_moe_offload.hf.discover import expert_spec, find_experts, take_over
from transformers_moe_offload.hf.install import method_of


@dataclass(frozen=True)
class Blueprint:
    """What loading a model with its experts offloaded would make of it."""

    name: str
    model: Any
    """On meta, with the routed experts taken out."""
    experts: tuple[ExpertSpec, ...]
    """What the experts of each sparse layer are made of."""
    dtype: torch.dtype
    dense_bytes: int
    """Bytes of everything but the routed experts: it stays in memory."""
    total_bytes: int
    """Bytes of everything that a checkpoint of the model holds, once where weights are tied."""
    stored: Stored
    """What the checkpoint says of itself, its dtype filled in from the config where it says none."""

    @property
    def recipe(self) -> OffloadConfig | None:
        """How the checkpoint was quantized; None if it was not."""
        stored = getattr(self.model.config, "quantization_config", None)
        return None if stored is None else OffloadConfig.from_dict(stored)

    @property
    def read_share(self) -> float:
        """Bytes in the files for each byte in memory: not 1 where the model is loaded in another dtype."""
        return (self.stored.dtype or self.dtype).itemsize / self.dtype.itemsize


def draw(name: str, origin: Origin, dtype: torch.dtype | None) -> Blueprint:
    """The model that `from_pretrained(name, dtype=dtype)` would load; `dtype` None means as stored.

    Raises `UnsupportedModelError` if it has no routed experts, `ConfigError` if another method has quantized them.
    """
    with reading(f"{name!r} is neither a folder with a model nor one that can be read from the Hub"):
        config = AutoConfig.from_pretrained(name, **origin.for_classes())
    _expect_known_sizes(name, method_of(name, {"config": config}))
    stored = what_is_stored(name, origin)
    dtype = dtype or config.dtype or stored.dtype or torch.get_default_dtype()
    with reading(f"no model can be built from the config of {name!r}"):
        model = _on_meta(config, dtype, origin.trust_remote_code)
    total_bytes = _saved_bytes(model)
    experts = tuple(expert_spec(index, *found) for index, found in enumerate(find_experts(model)))
    take_over(model)
    stored = Stored(stored.nbytes, stored.dtype or config.dtype)
    return Blueprint(name, model, experts, dtype, _saved_bytes(model), total_bytes, stored)


def _expect_known_sizes(name: str, method: str | None) -> None:
    """What experts of another method take is in the files, not in the config."""
    if method in (None, OffloadConfig.quant_method):
        return
    if method not in DELEGATED:
        raise refusal(name, str(method))
    raise CommandError(
        f"{name!r} is already quantized with {method!r}, and what its experts take is known once it is loaded: "
        f"`moe-offload chat` runs it, and `model.moe_offload.plan` shows it; to quantize anew, start from an "
        f"unquantized checkpoint"
    )


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The class that the checkpoint was saved from, or the causal language model for its config."""
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if model_class is not None:
            model = model_class._from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    _keep_dtypes(model, dtype)
    return model


def _keep_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Some parameters stay in float32 whatever the model is loaded in; do here what loading does."""
    checkpoint = Checkpoint(tensors={}, parameters=dict(model.state_dict()), dtype_plan=model._get_dtype_plan(dtype))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(checkpoint.dtype_of(name))


def _saved_bytes(model: nn.Module) -> int:
    once = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in once.values())
