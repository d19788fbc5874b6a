"""Register with Transformers, and unregister.

Two new entries in Transformers' tables, wrappers of a few of its own entries, and three patches.
- `PreTrainedModel.from_pretrained` accepts the keyword `moe_offload`; the Auto classes pass unknown keywords on to it.
  Not needed once Transformers lets a registered quantization method add keywords.
- `AutoConfig.from_pretrained`, which runs before, names a damaged config in its error (`hf/loading/damage.py`). Not
  needed once Transformers does.
- `PreTrainedModel.save_pretrained` writes models with quantized weights in a format of ours, and other models with the
  `state_dict` that it is given. Not needed once a quantization method may write files and sees that argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import copy
from operator import attrgetter
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

import transformers_moe_offload.models.adapter_moe  # noqa: F401 -- registers its model type
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.hf.arguments import asked_for, refuse_on_load
from transformers_moe_offload.hf.loading.damage import HUB_OPTIONS, expect_layers, explaining
from transformers_moe_offload.hf.other_quantizers.methods import DELEGATED, refusal
from transformers_moe_offload.hf.peft.register import uninstall_adapters
from transformers_moe_offload.hf.upstream import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    HfQuantizer,
    check_hooks,
    warn_if_untested,
)


def install() -> None:
    """Make every `from_pretrained` accept `moe_offload=`. Runs when the package is imported; idempotent.

    Raises `UpstreamError`, and changes nothing, if Transformers lacks a class or function that we need.
    """
    check_hooks()
    warn_if_untested()
    AUTO_QUANTIZER_MAPPING[OffloadConfig.quant_method] = _quantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[OffloadConfig.quant_method] = OffloadConfig
    for method in _delegated():
        if not _is_ours(AUTO_QUANTIZER_MAPPING[method]):
            AUTO_QUANTIZER_MAPPING[method] = _delegating(AUTO_QUANTIZER_MAPPING[method])
    for owner, name, wrap in _wrapped_methods():
        if not _is_ours(getattr(owner, name)):
            _replace(owner, name, wrap)


def uninstall() -> None:
    """Restore Transformers to its state before `install`. Loaded models keep working."""
    AUTO_QUANTIZER_MAPPING.pop(OffloadConfig.quant_method, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(OffloadConfig.quant_method, None)
    for method in _delegated():
        if _is_ours(AUTO_QUANTIZER_MAPPING[method]):
            AUTO_QUANTIZER_MAPPING[method] = AUTO_QUANTIZER_MAPPING[method].__wrapped__
    uninstall_adapters()
    for owner, name, _ in _wrapped_methods():
        if _is_ours(getattr(owner, name)):
            _replace(owner, name, attrgetter("__wrapped__"))


def _quantizer(quantization_config: OffloadConfig, **kwargs: Any) -> HfQuantizer:
    """Our quantizer. It is imported when it is used, and so is most of the package."""
    from transformers_moe_offload.hf.loading.quantizer import MoeOffloadQuantizer

    return MoeOffloadQuantizer(quantization_config, **kwargs)


def _delegating(plain: Any) -> Any:
    """Wrap a method's quantizer in Transformers' table: the same, unless `moe_offload=` was given."""

    @functools.wraps(plain, updated=())
    def quantizer(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
        method: HfQuantizer = plain(quantization_config, **kwargs)
        config = asked_for.get()
        if config is None:
            return method
        from transformers_moe_offload.hf.other_quantizers.quantizer import DelegatingQuantizer

        return DelegatingQuantizer(config, method)

    quantizer._is_of_moe_offload = True  # type: ignore[attr-defined]
    return quantizer


def _wrapped_methods() -> tuple[tuple[type, str, Callable[[Any], Any]], ...]:
    """The class and the name of each method that is wrapped, and the function that wraps it."""
    return (
        (AutoConfig, "from_pretrained", _naming_damage),
        (PreTrainedModel, "from_pretrained", _accepting_moe_offload),
        (PreTrainedModel, "save_pretrained", _saving_offloaded),
    )


def _replace(owner: type, name: str, change: Callable[[Any], Any]) -> None:
    """Replace a method by `change(method)`; for a class method `change` gets its function."""
    found = vars(owner)[name]
    setattr(owner, name, classmethod(change(found.__func__)) if isinstance(found, classmethod) else change(found))


def _delegated() -> list[str]:
    """Quantization methods whose experts can be offloaded and that this version of Transformers has."""
    return [method for method in DELEGATED if method in AUTO_QUANTIZER_MAPPING]


def _is_ours(method: Any) -> bool:
    return getattr(method, "_is_of_moe_offload", False)


def _naming_damage(plain: Any) -> Any:
    """Wrap `AutoConfig.from_pretrained`, to which the Auto classes pass their keywords, so that damage is named."""
    from_pretrained = explaining(plain)
    from_pretrained._is_of_moe_offload = True
    return from_pretrained


def _accepting_moe_offload(plain: Any) -> Any:
    """Wrap `from_pretrained` so that `moe_offload=` becomes a quantization config."""

    @functools.wraps(plain)
    @explaining
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        config = OffloadConfig.make(kwargs.pop("moe_offload", None))
        given = kwargs.get("quantization_config") or _take_out_of_config(kwargs)
        if isinstance(given, dict) and given.get("quant_method") == OffloadConfig.quant_method:
            given = OffloadConfig.from_dict(given)
        if config is not None and given is not None and _is_of_checkpoint(given, pretrained_model_name_or_path, kwargs):
            # lm-evaluation-harness (0.4.13) reads it from the checkpoint and passes it beside the user's arguments.
            given = None
        if config is not None and given is not None:
            raise ConfigError(
                f"both moe_offload and quantization_config={given!r} were given, but a model has one quantizer; "
                f"pass one of them"
            )
        if config is None and isinstance(given, OffloadConfig):
            config = given
        if config is None:
            return plain(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        refuse_on_load(kwargs)
        kwargs.pop("quantization_config", None)
        method = method_of(pretrained_model_name_or_path, kwargs)
        if method is None:
            kwargs["quantization_config"] = config
        elif method not in (OffloadConfig.quant_method, *_delegated()):
            raise refusal(pretrained_model_name_or_path, method)
        token = asked_for.set(config)
        try:
            return plain(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read the checkpoint of {pretrained_model_name_or_path}: {error}") from error
        finally:
            asked_for.reset(token)

    from_pretrained._is_of_moe_offload = True  # type: ignore[attr-defined]
    return from_pretrained


def _take_out_of_config(kwargs: dict[str, Any]) -> OffloadConfig | None:
    """The `OffloadConfig` that is set on a config object; `kwargs` get a copy of that object without it."""
    config = kwargs.get("config")
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, OffloadConfig):
        return None
    kwargs["config"] = copy(config)
    del kwargs["config"].quantization_config
    return found


def _saving_offloaded(plain: Any) -> Any:
    """Wrap `save_pretrained`: offloaded models are saved by `hf/model/saving.py`."""

    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers_moe_offload.hf.model.saving import save

        return save(plain, self, save_directory, *args, **kwargs)

    save_pretrained._is_of_moe_offload = True  # type: ignore[attr-defined]
    return save_pretrained


def method_of(name_or_path: Any, kwargs: dict[str, Any]) -> str | None:
    """The name of the method that a checkpoint is quantized with, from its config; None if it is not quantized.

    Finds the config as `from_pretrained` with these keywords would.
    """
    found = _stored_quantization(name_or_path, kwargs)
    if found is None:
        return None
    method = found.get("quant_method", "a method without a name")
    return str(getattr(method, "value", method))


def _stored_quantization(name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint's config, or of its text config; None if there is none."""
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        config = config.to_dict()
    elif name_or_path is None:
        return None
    else:
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config = PretrainedConfig.get_config_dict(config or name_or_path, **options)[0]
    expect_layers(name_or_path, kwargs, config)
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return found or None


def _is_of_checkpoint(given: Any, name_or_path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a quantization config equals the one in the checkpoint's config."""
    stored = _stored_quantization(name_or_path, kwargs)
    if stored is None or not AutoHfQuantizer.supports_quant_method(stored):
        return False
    if isinstance(given, dict):
        given = AutoQuantizationConfig.from_dict(dict(given)) if AutoHfQuantizer.supports_quant_method(given) else None
    return given is not None and AutoQuantizationConfig.from_dict(dict(stored)).to_dict() == given.to_dict()
