"""Register with Transformers, and take it back.

Two entries in Transformers' own tables, and one patch: `PreTrainedModel.from_pretrained` learns the keyword
`moe_offload`. The Auto classes pass unknown keywords on to it, so nothing else needs to be touched. The patch can go
when Transformers lets a registered quantization method add keywords of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.hf.quantizer import MoeOffloadQuantizer

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def install() -> None:
    """Make `moe_offload=` known to every `from_pretrained`. Importing the package does it; twice does no harm."""
    AUTO_QUANTIZER_MAPPING[OffloadConfig.quant_method] = MoeOffloadQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[OffloadConfig.quant_method] = OffloadConfig
    plain = PreTrainedModel.__dict__["from_pretrained"]
    if not _is_ours(plain):
        PreTrainedModel.from_pretrained = classmethod(_accepting_moe_offload(plain.__func__))


def uninstall() -> None:
    """Leave Transformers as it was before `install`. Models that are loaded keep working."""
    AUTO_QUANTIZER_MAPPING.pop(OffloadConfig.quant_method, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(OffloadConfig.quant_method, None)
    current = PreTrainedModel.__dict__["from_pretrained"]
    if _is_ours(current):
        PreTrainedModel.from_pretrained = classmethod(current.__func__.__wrapped__)


def _is_ours(method: Any) -> bool:
    return getattr(method.__func__, "_accepts_moe_offload", False)


def _accepting_moe_offload(plain: Any) -> Any:
    """Wrap `from_pretrained` so that `moe_offload=` becomes a quantization config."""

    @functools.wraps(plain)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        config = OffloadConfig.make(kwargs.pop("moe_offload", None))
        given = kwargs.get("quantization_config")
        if config is not None and given is not None:
            raise ConfigError(
                f"both moe_offload and quantization_config={given!r} were given, but a model has one quantizer; "
                f"pass one of them"
            )
        if config is None and isinstance(given, OffloadConfig):
            config = given
        if config is None:
            return plain(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        refuse_quantized_checkpoint(pretrained_model_name_or_path, kwargs)
        kwargs["quantization_config"] = config
        try:
            return plain(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read the checkpoint of {pretrained_model_name_or_path}: {error}") from error

    from_pretrained._accepts_moe_offload = True  # type: ignore[attr-defined]
    return from_pretrained


def refuse_quantized_checkpoint(name_or_path: Any, kwargs: dict[str, Any]) -> None:
    """Say clearly that experts of another quantization method cannot be read yet, before anything is downloaded."""
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        method = getattr(config, "quantization_config", None)
    elif name_or_path is None:
        return
    else:
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        method = PretrainedConfig.get_config_dict(config or name_or_path, **options)[0].get("quantization_config")
    if method:
        name = method.get("quant_method") if isinstance(method, dict) else method.quant_method
        raise ConfigError(
            f"{name_or_path} is already quantized with {getattr(name, 'value', name)!r}; offloading experts that "
            f"another method has quantized is not supported yet. Load it without moe_offload, or use an unquantized "
            f"checkpoint of the model"
        )
