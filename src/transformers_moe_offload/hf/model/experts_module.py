"""The class and the forward of an experts module while its experts are offloaded.

The module keeps its place and its attributes; a subclass of its class, with our `forward`, replaces the class.
Restoring the class undoes this, and `deepcopy`, hooks and `isinstance` work as before.
"""

# T tokens, H hidden

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute import custom_op
from transformers_moe_offload.compute.deltas import NOTHING, Adaptation
from transformers_moe_offload.errors import CheckpointError, UnsupportedModelError
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.model.layer_forward import Call, LayerForward
from transformers_moe_offload.hf.model.own_experts import NAME as OWN_EXPERTS
from transformers_moe_offload.hf.model.own_experts import own_experts
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.peft.active_deltas import added_to, are_any_added


class Handle(Protocol):
    """What an experts module asks of the handle of its model (`handle.py`), outside of decode steps."""

    @property
    def model(self) -> Any:
        """The model."""

    def spec(self, layer: SparseLayer) -> ExpertSpec:
        """What a layer's experts are made of now."""

    def prepare(self, experts: OffloadedLayer, device: torch.device) -> LayerForward:
        """What computes a layer whose inputs are on a device, from now on."""

    def moved(self, experts: OffloadedLayer, fn: Callable[[Tensor], Tensor]) -> None:
        """A module is moved or cast: `fn` is applied to its parameters."""


class OffloadedLayer:
    """What an offloaded experts module holds: which layer it is, and what computes it now."""

    def __init__(self, layer: SparseLayer) -> None:
        self.layer = layer
        self.handle: Handle | None = None
        """The handle of the model; None while the model is being loaded."""
        self.current: LayerForward | None = None
        """What computes the layer; None until caches have been built, and again once they have been dropped."""
        self.is_changed = False
        """Whether an attribute of the module was set since then, so that it may compute something else."""
        self.follows_cache: str | None = None
        """The strategy that chooses this layer's experts by what is resident, so that results depend on it; None as a
        rule."""
        self.key = custom_op.key_for(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedLayer:
        copied = OffloadedLayer(self.layer)
        memo[id(self)] = copied
        copied.handle = deepcopy(self.handle, memo)
        copied.is_changed = self.is_changed
        copied.follows_cache = self.follows_cache
        return copied

    def residents(self) -> Tensor | None:
        """(E,) bool: the experts that are resident or loading; None if all are, or before caches have been built."""
        return None if self.current is None else self.current.experts.residents()

    def ready(self, device: torch.device) -> LayerForward:
        """What computes the layer for inputs on a device; builds caches if there are none."""
        current = self.current
        if current is None or current.device != device:
            assert self.handle is not None
            current = self.handle.prepare(self, device)
        return current

    def forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        """Replaces the module's forward, for any arguments."""
        adaptation = self._adaptation(module)
        needs_grad = torch.is_grad_enabled() and (
            adaptation.needs_gradient() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        )
        call = Call(module, inputs, adaptation, needs_grad, self.is_changed)
        for path in self.ready(inputs[0].device).paths:
            if path.serves(call):
                return path.forward(call)
        raise AssertionError("the last path serves every call")

    def compute(self, *inputs: Tensor) -> Tensor:
        """As `forward`, for compiled code, which does not have the module."""
        assert self.handle is not None
        module = experts_at(self.handle.model, self.layer.name)
        if offloaded(module) is not self:
            raise UnsupportedModelError(
                f"{self.layer.name} was moved, copied or replaced since the model was loaded, which compiled code does "
                f"not follow; run the model without torch.compile"
            )
        return self.forward(module, inputs)

    def _adaptation(self, module: nn.Module) -> Adaptation:
        """What adapters add to the experts in this forward, and the module's own experts."""
        if not are_any_added() and OWN_EXPERTS not in module._modules:
            return NOTHING
        return Adaptation(added_to(self), own_experts(module)) or NOTHING


class OffloadedExperts(nn.Module):
    """Mixed into the class of an experts module while it is offloaded."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute with experts from the cache, by code that `torch.compile` does not trace."""
        held = offloaded(self)
        inputs = held.layer.inputs(args, kwargs) if kwargs else args
        if not torch.compiler.is_compiling():
            return held.forward(self, inputs)
        if held.layer.mlp is not None and custom_op.fits(held.layer.device):
            return custom_op.experts(*inputs, held.key)
        return _not_compiled(self, inputs)

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
        if not (name == "training" or name.startswith("_")) or name == "_apply_gate":
            offloaded(self).is_changed = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = offloaded(self)
        if held.handle is not None:
            held.handle.moved(held, fn)
        return super()._apply(fn, recurse)


@torch.compiler.disable(reason="a sparse layer with gradients, autocast or arithmetic of its own is not compiled")  # type: ignore[untyped-decorator]
def _not_compiled(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    return offloaded(module).forward(module, inputs)


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


def offloaded(module: nn.Module) -> OffloadedLayer:
    """What an offloaded experts module holds."""
    held: OffloadedLayer = module.__dict__["_moe_offload_layer"]
    return held


def layer_of(module: nn.Module) -> SparseLayer:
    """The sparse layer of an offloaded experts module."""
    return offloaded(module).layer


def bind(module: nn.Module, layer: SparseLayer) -> None:
    """Replace the module's class, so that the layer computes its forward."""
    vars(module)["_moe_offload_layer"] = OffloadedLayer(layer)
    module.__class__ = _offloaded_class(layer.plain_class)  # type: ignore[arg-type]


def unbind(module: nn.Module) -> None:
    """Restore the module's class, so that it computes its own forward."""
    held = vars(module).pop("_moe_offload_layer")
    module.__class__ = held.layer.plain_class


@cache
def _offloaded_class(plain_class: Any) -> type[nn.Module]:
    return type(plain_class.__name__, (OffloadedExperts, plain_class), {"__module__": plain_class.__module__})
