"""One offloaded sparse layer: the experts module in the model, and the forward that replaces its own.

The module keeps its place and its attributes; a subclass of its class, whose `forward` calls this file, replaces the
class. Restoring the class undoes this, and `deepcopy`, hooks and `isinstance` work as before.
"""

# T tokens, K experts per token, H hidden

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformers_moe_offload.backward.deltas import NOTHING, Adaptation
from transformers_moe_offload.backward.differentiable_forward import adapted_forward
from transformers_moe_offload.backward.saved_tensors import Lending
from transformers_moe_offload.backward.weights import Lender
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute import custom_op
from transformers_moe_offload.compute.forward import HostHelp, sparse_forward
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError, UnsupportedModelError
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.decode.decoding import Decoding
from transformers_moe_offload.hf.layouts import ExpertField, ExpertsLayout
from transformers_moe_offload.hf.model.eager import fetch_from, twin_of
from transformers_moe_offload.hf.model.own_experts import NAME as OWN_EXPERTS
from transformers_moe_offload.hf.model.own_experts import own_experts
from transformers_moe_offload.hf.peft.active_deltas import added_to
from transformers_moe_offload.store.layer_source import LayerSource


class Resources(Protocol):
    """What a layer takes from the handle of its model (`handle.py`)."""

    @property
    def model(self) -> Any:
        """The model."""

    @property
    def decoding(self) -> Decoding:
        """What of the model decodes on the device."""

    def spec(self, layer: SparseLayer) -> ExpertSpec:
        """What a layer's experts are made of now."""

    def source(self, layer: SparseLayer) -> LayerSource:
        """Where a layer's experts come from now."""

    def cache_for(self, layer: SparseLayer, device: torch.device) -> ExpertCache:
        """The cache of a layer whose inputs are on a device."""

    def look_ahead_from(self, layer: SparseLayer, hidden: Tensor) -> Callable[[Sequence[int]], None] | None:
        """What to call with the experts that a layer wants, once their loads have started."""

    def host_side_of(self, layer: SparseLayer) -> HostHelp | None:
        """What the host computes of a layer's misses."""

    def lender(self, layer: SparseLayer, device: torch.device, cast_to: torch.dtype | None = None) -> Lender:
        """A lender of the layer's experts to the backward pass of this forward."""

    def move(self, layer: SparseLayer, device: torch.device, dtype: torch.dtype) -> None:
        """A layer computes on another device or in another dtype from now on."""


class SparseLayer:
    """The state of an offloaded experts module, and its forward."""

    def __init__(
        self,
        index: int,
        name: str,
        plain_class: type[nn.Module],
        layout: ExpertsLayout,
        fields: tuple[ExpertField, ...],
        num_experts: int,
        eager_forward: Callable[..., Tensor],
        parameter_order: dict[str, tuple[str, ...]],
    ) -> None:
        self.index = index
        self.name = name
        """Path of the module in the model."""
        self.plain_class = plain_class
        self.layout = layout
        self.fields = fields
        self.num_experts = num_experts
        self.parameter_order = parameter_order
        self.mlp: ExpertMlp | None = None
        """The arithmetic of our own forward; None where the module's eager forward is used."""
        self.device = torch.device("cpu")
        self.runtime: Resources | None = None
        self.eager_forward = eager_forward
        self.key = custom_op.key_for(self)
        self._input_names = tuple(inspect.signature(eager_forward).parameters)[1:]

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLayer:
        twin = object.__new__(SparseLayer)
        memo[id(self)] = twin
        vars(twin).update(vars(self))  # all immutable, except the runtime, which is copied below
        twin.key = custom_op.key_for(twin)
        twin.runtime = deepcopy(self.runtime, memo)
        return twin

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the dtypes that the model was built with, before loading or casts."""
        return sum(prod(field.shape) * field.dtype.itemsize for field in self.fields)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of the module's forward in their order, whether passed by position or by name."""
        return args + tuple(kwargs[name] for name in self._input_names[len(args) :])

    def compute(self, *inputs: Tensor) -> Tensor:
        """As `forward`, for callers that do not have the module, such as compiled code."""
        assert self.runtime is not None
        module = experts_at(self.runtime.model, self.name)
        if layer_of(module) is not self:
            raise UnsupportedModelError(
                f"{self.name} was moved, copied or replaced since the model was loaded, which compiled code does not "
                f"follow; run the model without torch.compile"
            )
        return self.forward(module, inputs)

    def forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        """Replaces the module's forward, for any arguments."""
        assert self.runtime is not None
        adaptation = self._adaptation(module)
        needs_grad = torch.is_grad_enabled() and (
            adaptation.needs_gradient() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        )
        cache = self.runtime.cache_for(self, inputs[0].device)
        out = self._computed(module, cache, inputs, adaptation, needs_grad=needs_grad)
        if needs_grad:
            cache.give_back()  # training is short of memory, and mapping pages again is fast compared with its steps
        return out

    def _computed(
        self,
        module: nn.Module,
        cache: ExpertCache,
        inputs: tuple[Any, ...],
        adaptation: Adaptation,
        *,
        needs_grad: bool,
    ) -> Tensor:
        """The layer's output, by our own arithmetic or the eager forward."""
        assert self.runtime is not None
        if self.mlp is None:
            return self._eager(module, cache, inputs, adaptation, needs_grad=needs_grad)
        decoding = self.runtime.decoding
        addressed = decoding.layer(self.index, module, inputs, needs_grad=needs_grad, is_adapted=bool(adaptation))
        if addressed is not None:
            return decoding.compute(addressed, module, *inputs)
        cast_to = self._cast_for(inputs[0])
        options: dict[str, Any] = {
            "codings": self.runtime.source(self).codings,
            "cast_to": cast_to,
            "started": self.runtime.look_ahead_from(self, inputs[0]),
        }
        if not adaptation and not needs_grad:
            host = self.runtime.host_side_of(self) if cast_to is None else None
            return sparse_forward(cache, self.index, self.mlp, module, *inputs, host=host, **options)
        lender = self.runtime.lender(self, inputs[0].device, cast_to)
        return adapted_forward(
            cache, self.index, self.mlp, module, *inputs, adaptation=adaptation, lender=lender, **options
        )

    def _cast_for(self, hidden: Tensor) -> torch.dtype | None:
        """The dtype that experts are cast to for rows like these; None if they have it, or autocast casts.

        Dtypes differ after `parameter.data = parameter.data.float()`, as in PEFT's `prepare_model_for_kbit_training`,
        which reaches all parameters but offloaded experts. The rows then have the new dtype: experts are cast to it
        when used, and stay unchanged in the cache. (`model.float()` casts them in the cache.)
        """
        assert self.runtime is not None
        if hidden.dtype == torch_dtype(self.runtime.spec(self).fields[0].dtype):
            return None
        return None if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype

    def _adaptation(self, module: nn.Module) -> Adaptation:
        """The adapters on the layer's experts in this forward, and its own experts."""
        low_rank, own = added_to(self), own_experts(module)
        return Adaptation(low_rank, own) if low_rank or own else NOTHING

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow `nn.Module.to` or a similar method, which applies `fn` to every parameter."""
        assert self.runtime is not None
        dtype = self.runtime.spec(self).fields[0].dtype
        probe = fn(torch.empty(0, dtype=torch_dtype(dtype), device=self.device))
        if probe.device.type != "meta":
            self.runtime.move(self, probe.device, probe.dtype)

    def _eager(
        self,
        module: nn.Module,
        cache: ExpertCache,
        inputs: tuple[Any, ...],
        adaptation: Adaptation,
        *,
        needs_grad: bool,
    ) -> Tensor:
        """Transformers' eager forward, over weights that are fetched when it indexes them."""
        assert self.runtime is not None
        source, device = self.runtime.source(self), inputs[0].device
        cast_to = self._cast_for(inputs[0])
        lender = self.runtime.lender(self, device, cast_to)
        wanted = self.layout.wanted(self.num_experts, *inputs, keep_zero_weights=needs_grad)
        wanted = [expert for expert in wanted if expert not in adaptation.own]
        lender.used(wanted)
        started = self.runtime.look_ahead_from(self, inputs[0])
        with cache.turn, cache.visit(self.index, wanted, started) as visit:
            fetch = fetch_from(visit, source.spec, device, codings=source.codings, cast_to=cast_to)
            lending = Lending(fetch, lender.copy, adaptation)
            twin = twin_of(module, self.plain_class, self.fields, lending)
            try:
                with lending.recorded() if needs_grad else nullcontext():
                    return self.eager_forward(twin, *inputs)
            finally:
                lending.end()


class OffloadedExperts(nn.Module):
    """Mixed into the class of an experts module while it is offloaded."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute with experts from the cache, by code that `torch.compile` does not trace."""
        layer = layer_of(self)
        inputs = layer.inputs(args, kwargs)
        if not torch.compiler.is_compiling():
            return layer.forward(self, inputs)
        if layer.mlp is not None and custom_op.fits(layer.device):
            return custom_op.experts(*inputs, layer.key)
        return _computed_as_ever(self, inputs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Raise for experts in the state dict: loading the whole model has removed them before (`state_dicts.py`)."""
        own = {f"{prefix}{name}" for name in nn.Module.state_dict(self)}
        other = next((name for name in state_dict if name.startswith(prefix) and name not in own), None)
        if other is not None and other.startswith(f"{prefix}{OWN_EXPERTS}."):
            layer, expert = layer_of(self), int(other.removeprefix(f"{prefix}{OWN_EXPERTS}.").split(".")[0])
            raise CheckpointError(
                f"{other} is an expert that was trained in full, and here it is offloaded; call "
                f"training.unfreeze_experts(model, {{{layer.index}: [{expert}]}}) first, with all such experts"
            )
        if other is not None:
            raise CheckpointError(
                f"{other} is an expert, and experts are loaded by the offloaded model only, not by a part of it or by "
                f"what it is a part of; call load_state_dict of the model that has moe_offload, or leave experts out"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and any(name == field.paths[0] for field in layer_of(self).fields):
            raise UnsupportedModelError(
                f"{name} of {layer_of(self).name} cannot be replaced: its experts are offloaded and constant; use "
                f"training.unfreeze_experts for those that are to be changed, or model.moe_offload.restore()"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layer_of(self).moved(fn)
        return super()._apply(fn, recurse)


@torch.compiler.disable(reason="a sparse layer with gradients, autocast or arithmetic of its own is not compiled")  # type: ignore[untyped-decorator]
def _computed_as_ever(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    return layer_of(module).forward(module, inputs)


def experts_at(model: nn.Module, path: str) -> nn.Module:
    """The experts module at a path of the model, without the wrappers that PEFT may have put around it.

    Raises `UnsupportedModelError` if the path no longer exists.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{path} is not in {type(model).__name__} any more ({error}); load the model without moe_offload to change "
            f"its layers, save that, and load what was saved with moe_offload"
        ) from error
    while not isinstance(module, OffloadedExperts) and "base_layer" in module._modules:
        module = module.get_submodule("base_layer")
    return module


def layer_of(module: nn.Module) -> SparseLayer:
    """The sparse layer of an offloaded experts module."""
    layer = vars(module)["_moe_offload_layer"]
    assert isinstance(layer, SparseLayer)
    return layer


def bind(module: nn.Module, layer: SparseLayer) -> None:
    """Replace the module's class, so that the layer computes its forward."""
    vars(module)["_moe_offload_layer"] = layer
    module.__class__ = _offloaded_class(layer.plain_class)  # type: ignore[arg-type]


def unbind(module: nn.Module) -> None:
    """Restore the module's class, so that it computes its own forward."""
    layer = vars(module).pop("_moe_offload_layer")
    module.__class__ = layer.plain_class


@cache
def _offloaded_class(plain_class: Any) -> type[nn.Module]:
    return type(plain_class.__name__, (OffloadedExperts, plain_class), {"__module__": plain_class.__module__})
