"""A model without its weights: built on meta from its config, as loading would build it.

Reads `config.json` only; `stored.py` reads the checkpoint's index and headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from transformers_moe_offload.cli.failures import reading
from transformers_moe_offload.cli.model_config import read_config
from transformers_moe_offload.cli.options import Origin
from transformers_moe_offload.cli.stored import Stored, stored_tensors, what_is_stored
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.install import method_of
from transformers_moe_offload.hf.loading.checkpoint import Checkpoint
from transformers_moe_offload.hf.loading.discover import expert_spec, find_experts, take_over
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.hf.other_quantizers.dequantize import Opener, StoredBytes
from transformers_moe_offload.hf.other_quantizers.methods import DELEGATED, refusal
from transformers_moe_offload.hf.prebuilt.source import Quantization
from transformers_moe_offload.hf.upstream import dtype_plan


@dataclass(frozen=True)
class Blueprint:
    """A model as loading it with offloaded experts would build it."""

    name: str
    model: Any
    """On meta, with the routed experts taken out."""
    experts: tuple[ExpertSpec, ...]
    """What the experts of each sparse layer are made of."""
    dtype: torch.dtype
    dense_bytes: int
    """Bytes of everything but the routed experts: it stays in memory."""
    total_bytes: int
    """Bytes of all weights in a checkpoint's own files; tied weights count once."""
    stored: Stored
    """The size and dtype that the checkpoint states; the dtype is the config's where it states none."""
    opener: Opener | None = None
    """Dequantizes the weights, where another method has quantized them."""

    @property
    def title(self) -> str:
        """Name, class and dtype in one line."""
        return f"{self.name}: {type(self.model).__name__}, {dtype_name(self.dtype)}"

    @property
    def recipe(self) -> OffloadConfig | None:
        """How the checkpoint was quantized; None if it was not."""
        stored = getattr(self.model.config, "quantization_config", None)
        return None if stored is None else OffloadConfig.from_dict(stored)

    @property
    def read_share(self) -> float:
        """Bytes in the files for each byte in memory: not 1 where the model is loaded in another dtype."""
        if self.opener is not None:
            return 1.0
        return (self.stored.dtype or self.dtype).itemsize / self.dtype.itemsize

    @property
    def keeps_dense(self) -> bool:
        """Whether loading leaves the dense part as another method has stored it."""
        return self.opener is not None and self.opener.keeps_dense

    def quantization(self, config: OffloadConfig) -> Quantization:
        """The weights, quantized as a config says."""
        return Quantization.of(self.model, config, self.dtype, self.opener)

    def stored_bytes(self, quantization: Quantization, origin: Origin) -> StoredBytes | None:
        """Bytes of weights that another method has quantized, from the headers of their files; None for others."""
        if self.opener is None:
            return None
        with reading(f"{self.name!r} is quantized with {self.opener.name!r}, and the headers of its files say how"):
            return quantization.stored_bytes(stored_tensors(self.name, self.model.config, origin))


def draw(name: str, origin: Origin, dtype: torch.dtype | None) -> Blueprint:
    """The model that `from_pretrained(name, dtype=dtype)` would load; `dtype` None means as stored.

    Raises `UnsupportedModelError` if it has no routed experts, `ConfigError` if their quantization is not supported.
    """
    what = f"{name!r} is neither a folder with a model nor one that can be read from the Hub"
    config = read_config(name, origin, what)
    opener = _opener(name, config)
    stored = what_is_stored(name, origin)
    dtype = dtype or config.dtype or stored.dtype or torch.get_default_dtype()
    with reading(f"no model can be built from the config of {name!r}"):
        model = _on_meta(config, dtype, origin.trust_remote_code)
    total_bytes = _saved_bytes(model)
    experts = tuple(expert_spec(index, *found) for index, found in enumerate(find_experts(model)))
    take_over(model)
    dense_bytes = _saved_bytes(model)
    layers = [layer_of(module) for module in model.modules() if isinstance(module, OffloadedExperts)]
    if any(layer.layout.has_own_files for layer in layers):
        total_bytes = dense_bytes
    stored = Stored(stored.nbytes, stored.dtype or config.dtype)
    return Blueprint(name, model, experts, dtype, dense_bytes, total_bytes, stored, opener)


def _opener(name: str, config: PretrainedConfig) -> Opener | None:
    """The opener of weights that another method has quantized; takes that method out of the config."""
    method = method_of(name, {"config": config})
    if method in (None, OffloadConfig.quant_method):
        return None
    if method not in DELEGATED:
        raise refusal(name, str(method))
    with reading(f"cannot read how {name!r} is quantized"):
        return Opener.take_from(config)


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The class that the checkpoint was saved from, or the causal language model for its config."""
    model_class = getattr(transformers, str((config.architectures or [""])[0]), None)
    with torch.device("meta"):
        if model_class is not None:
            model = model_class._from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    _keep_dtypes(model, dtype)
    return model


def _keep_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Some parameters stay in float32 whatever the model is loaded in; do here what loading does."""
    checkpoint = Checkpoint(tensors={}, parameters=dict(model.state_dict()), dtype_plan=dtype_plan(model, dtype))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(checkpoint.dtype_of(name))


def _saved_bytes(model: nn.Module) -> int:
    once = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in once.values())
