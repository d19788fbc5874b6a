"""Check that the experts modules of a model are still where they were when it was loaded.

Layers of a model can be moved, copied, dropped or replaced; a forward uses the modules that are there. But experts are
saved, restored and loaded by their paths in the checkpoint, which then belong to other experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, OffloadedLayer, experts_at, offloaded
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer

_INSTEAD = "load the model without moe_offload to change it, save that, and load what was saved with moe_offload"


def is_in_place(model: nn.Module, experts: OffloadedLayer) -> bool:
    """Whether a layer's module is still at its path."""
    try:
        module = experts_at(model, experts.layer.name)
    except UnsupportedModelError:
        return False
    return isinstance(module, OffloadedExperts) and offloaded(module) is experts


def expect_in_place(model: nn.Module, layers: Sequence[OffloadedLayer]) -> None:
    """Raise `UnsupportedModelError` if a layer's module has moved, the number of offloaded modules has changed, or
    parameters have replaced placeholders of offloaded experts."""
    for experts in layers:
        layer = experts.layer
        if not is_in_place(model, experts):
            raise UnsupportedModelError(
                f"{layer.name} is not the module that was loaded at this path of {type(model).__name__}, so its "
                f"experts cannot be found; {_INSTEAD}"
            )
        given = _registered(experts_at(model, layer.name), layer)
        if given is not None:
            raise UnsupportedModelError(
                f"{layer.name}.{given} was registered as a parameter, but its experts are offloaded and read from the "
                f"checkpoint; {_INSTEAD}"
            )
    found = sum(isinstance(module, OffloadedExperts) for module in model.modules())
    if found != len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has {found} offloaded sparse layers, but was loaded with {len(layers)}; {_INSTEAD}"
        )


def _registered(module: nn.Module, layer: SparseLayer) -> str | None:
    """The path of a parameter that has replaced a placeholder of offloaded experts; None if there is none."""
    paths: Iterable[str] = (path for field in layer.fields for path in field.paths)
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        if leaf in module.get_submodule(owner)._parameters:
            return path
    return None
