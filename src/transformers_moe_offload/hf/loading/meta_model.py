"""A model without its weights: built on meta from its config, as loading would build it.

Reads `config.json` only; `hub/weights.py` reads the checkpoint's index and headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its __all__
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.install import method_of
from transformers_moe_offload.hf.loading.checkpoint import Checkpoint
from transformers_moe_offload.hf.loading.discover import expert_spec, find_experts, take_over
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.hf.other_quantizers.dequantize import Opener
from transformers_moe_offload.hf.other_quantizers.methods import DELEGATED, refusal
from transformers_moe_offload.hf.upstream import dtype_plan
from transformers_moe_offload.hub.fetch import Fetched, fetch
from transformers_moe_offload.hub.weights import Stored, stored_tensors, what_is_stored
from transformers_moe_offload.tensor_files.index import StoredTensor
from transformers_moe_offload.untrusted import reading

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class MetaModel:
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
    hub_options: Mapping[str, Any]
    """`revision`, `token` and `local_files_only`: the keywords that its files are read with."""
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

    def quantized_tensors(self) -> Mapping[str, StoredTensor] | None:
        """All tensors of a checkpoint that another method has quantized, from the headers; None for any other."""
        if self.opener is None:
            return None
        with reading(f"{self.name!r} is quantized with {self.opener.name!r}, and the headers of its files say how"):
            return stored_tensors(self.name, self.model.config, self.hub_options)

    def fetch(self) -> Fetched:
        """The checkpoint's files, downloaded where they are not here."""
        with reading(f"cannot read the weights of {self.name!r}"):
            return fetch(self.name, self.model.config, self.hub_options)


def meta_model(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    revision: str = "main",
    token: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> MetaModel:
    """The model that `from_pretrained(name, dtype=dtype)` would load; `dtype` None means as stored.

    Raises `CheckpointError` if there is no such model, `UnsupportedModelError` if it has no routed experts,
    `ConfigError` if their quantization is not supported.
    """
    what = f"{name!r} is neither a folder with a model nor one that can be read from the Hub"
    options = {"revision": revision, "token": token, "local_files_only": local_files_only}
    config = read_config(name, what, **options, trust_remote_code=trust_remote_code)
    opener = _opener(name, config)
    stored = what_is_stored(name, options)
    dtype = dtype or config.dtype or stored.dtype or torch.get_default_dtype()
    with reading(f"no model can be built from the config of {name!r}"):
        model = _on_meta(config, dtype, trust_remote_code)
    total_bytes = _saved_bytes(model)
    experts = tuple(expert_spec(index, *found) for index, found in enumerate(find_experts(model)))
    take_over(model)
    dense_bytes = _saved_bytes(model)
    layers = [layer_of(module) for module in model.modules() if isinstance(module, OffloadedExperts)]
    if any(layer.layout.has_own_files for layer in layers):
        total_bytes = dense_bytes
    stored = Stored(stored.nbytes, stored.dtype or config.dtype)
    return MetaModel(name, model, experts, dtype, dense_bytes, total_bytes, stored, options, opener)


def read_config(name: str, what: str, **options: Any) -> PretrainedConfig:
    """The config of a model in a folder or on the Hub; `what` begins the error where there is none.

    Read before anything else of a model: a misspelt folder is not looked up on the Hub, and the caller waits for an
    unreachable Hub once, not again for tokenizer and weights. `options` are those of `AutoConfig.from_pretrained`.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        is_adapter = (folder / _ADAPTER).is_file()
        hint = f"it holds an adapter ({_ADAPTER}); name the model that the adapter is for" if is_adapter else ""
        raise CheckpointError(f"{what}: the folder has no {_CONFIG}; {hint or 'name one that a model was saved to'}")
    if folder.is_file():
        raise CheckpointError(f"{what}: it is a file; name the folder that a model was saved to, or an id of the Hub")
    if not folder.exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise CheckpointError(
                f"{what}: there is no such folder, and it is not a valid Hub id, such as 'org/model'"
            ) from error
        what = f"there is no folder {name!r} here, and no model of that name can be read from the Hub"
    with reading(what):
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError, ImportError):
            raise
        except Exception as error:  # classes of configs raise various errors for values that they do not expect
            raise CheckpointError(f"{what}: its config is not valid: {error}") from error
        return config


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
