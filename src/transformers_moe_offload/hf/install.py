"""Register with Transformers, and take it back.

Two entries in Transformers' own tables, a few that stand in front of its own, and three patches.
`PreTrainedModel.from_pretrained` learns the keyword `moe_offload`; the Auto classes pass unknown keywords on to it, so
nothing else needs to be touched. This patch can go when Transformers lets a registered quantization method add keywords
of its own. `AutoConfig.from_pretrained`, which comes before, names a config that is damaged once it has failed
(`hf/loading/damage.py`); this one can go when Transformers does. `PreTrainedModel.save_pretrained` writes models with
quantized weights in a format of ours, and others with the weights that it is given; this one can go when a quantization
method may write files, and sees these weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.hf.arguments import refuse_on_load, refuse_on_save
from transformers_moe_offload.hf.loading.damage import HUB_OPTIONS, expect_layers, explaining
from transformers_moe_offload.hf.loading.quantizer import MoeOffloadQuantizer, asked_for, to_save
from transformers_moe_offload.hf.model.handle import OffloadRuntime
from transformers_moe_offload.hf.model.places import expect_in_place
from transformers_moe_offload.hf.model.saving import expect_no_adapter, expect_whole, save_quantized
from transformers_moe_offload.hf.other_quantizers.methods import DELEGATED, refusal
from transformers_moe_offload.hf.other_quantizers.quantizer import delegating
from transformers_moe_offload.hf.peft.register import uninstall_adapters
from transformers_moe_offload.hf.upstream import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    check_hooks,
    has_peft_adapter,
    warn_if_untested,
)


def install() -> None:
    """Make `moe_offload=` known to every `from_pretrained`. Importing the package does it; twice does no harm.

    Raises `UpstreamError`, and changes nothing, if Transformers lacks something that is needed for it.
    """
    check_hooks()
    warn_if_untested()
    AUTO_QUANTIZER_MAPPING[OffloadConfig.quant_method] = MoeOffloadQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[OffloadConfig.quant_method] = OffloadConfig
    for method in _delegated():
        if not _is_ours(AUTO_QUANTIZER_MAPPING[method]):
            AUTO_QUANTIZER_MAPPING[method] = delegating(AUTO_QUANTIZER_MAPPING[method])
    for owner, name, wrap in _wrapped_methods():
        if not _is_ours(getattr(owner, name)):
            _replace(owner, name, wrap)


def uninstall() -> None:
    """Leave Transformers as it was before `install`. Models that are loaded keep working."""
    AUTO_QUANTIZER_MAPPING.pop(OffloadConfig.quant_method, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(OffloadConfig.quant_method, None)
    for method in _delegated():
        if _is_ours(AUTO_QUANTIZER_MAPPING[method]):
            AUTO_QUANTIZER_MAPPING[method] = AUTO_QUANTIZER_MAPPING[method].__wrapped__
    uninstall_adapters()
    for owner, name, _ in _wrapped_methods():
        if _is_ours(getattr(owner, name)):
            _replace(owner, name, attrgetter("__wrapped__"))


def _wrapped_methods() -> tuple[tuple[type, str, Callable[[Any], Any]], ...]:
    """The class and the name of each method that is wrapped, and what wraps it."""
    return (
        (AutoConfig, "from_pretrained", _naming_damage),
        (PreTrainedModel, "from_pretrained", _accepting_moe_offload),
        (PreTrainedModel, "save_pretrained", _saving_offloaded),
    )


def _replace(owner: type, name: str, change: Callable[[Any], Any]) -> None:
    """Put what `change` makes of a method, or of a class method's function, in its place."""
    found = vars(owner)[name]
    setattr(owner, name, classmethod(change(found.__func__)) if isinstance(found, classmethod) else change(found))


def _delegated() -> list[str]:
    """The methods whose experts can be offloaded, as far as this version of Transformers has them."""
    return [method for method in DELEGATED if method in AUTO_QUANTIZER_MAPPING]


def _is_ours(method: Any) -> bool:
    return getattr(method, "_is_of_moe_offload", False)


def _naming_damage(plain: Any) -> Any:
    """Wrap `AutoConfig.from_pretrained`, to which the Auto classes hand the keywords they were given."""
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
            # lm-evaluation-harness (0.4.13) reads it from the checkpoint and hands it over beside what it was told.
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
    """The `OffloadConfig` that was set on a config object, as if it had been given beside it."""
    config = kwargs.get("config")
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, OffloadConfig):
        return None
    kwargs["config"] = copy(config)
    del kwargs["config"].quantization_config
    return found


def _saving_offloaded(plain: Any) -> Any:
    """Wrap `save_pretrained` so that quantized weights are saved as they are, others with those that are given, and
    neither beside an adapter."""

    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = getattr(self, "moe_offload", None)
        if not isinstance(runtime, OffloadRuntime):
            expect_whole(self)
            return plain(self, save_directory, *args, **kwargs)
        options = inspect.signature(plain).bind(self, save_directory, *args, **kwargs).arguments
        if not has_peft_adapter(self):
            expect_in_place(self, runtime.layers)
            expect_no_adapter(Path(save_directory))
        is_quantized = runtime.is_quantized and not has_peft_adapter(self)
        refuse_on_save(options, is_quantized=is_quantized)
        if not is_quantized:
            token = to_save.set(options.get("state_dict"))
            try:
                return plain(self, save_directory, *args, **kwargs)
            finally:
                to_save.reset(token)
        if not options.get("is_main_process", True):
            return None
        save_quantized(self, Path(save_directory), options.get("state_dict"), options.get("max_shard_size"))
        if options.get("push_to_hub"):
            repo = {"repo_id": Path(save_directory).name, "token": options.get("token")}
            size = {name: options[name] for name in ("max_shard_size",) if name in options}
            self.push_to_hub(**repo | size | options.get("kwargs", {}))
        return None

    save_pretrained._is_of_moe_offload = True  # type: ignore[attr-defined]
    return save_pretrained


def method_of(name_or_path: Any, kwargs: dict[str, Any]) -> str | None:
    """The method that a checkpoint is quantized with, by the name that its config gives; None if there is none.

    Asks for the config as `from_pretrained` with these keywords would.
    """
    found = _stored_quantization(name_or_path, kwargs)
    if found is None:
        return None
    method = found.get("quant_method", "a method without a name")
    return str(getattr(method, "value", method))


def _stored_quantization(name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's config says about how it is quantized."""
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
    """Whether a quantization config says what the checkpoint says of itself."""
    stored = _stored_quantization(name_or_path, kwargs)
    if stored is None or not AutoHfQuantizer.supports_quant_method(stored):
        return False
    if isinstance(given, dict):
        given = AutoQuantizationConfig.from_dict(dict(given)) if AutoHfQuantizer.supports_quant_method(given) else None
    return given is not None and AutoQuantizationConfig.from_dict(dict(stored)).to_dict() == given.to_dict()
