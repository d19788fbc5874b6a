"""Which experts of a router's layers need no load, in whatever model the router is."""

# E experts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, OffloadedLayer, experts_at, offloaded
from transformers_moe_offload.routing.forward_context import ForwardContext


class Residents:
    """Call it for the residents of the sparse layers that follow one router."""

    def __init__(self, context: ForwardContext, paths: Sequence[str]) -> None:
        """`paths` of the experts modules of these layers, in the model of the context."""
        self.paths = tuple(paths)
        self._context = context
        self._found: list[OffloadedLayer] | None = None

    def __call__(self) -> Tensor | None:
        """(E,) bool: the experts that are resident or loading, in most of the layers if there are several.

        None if nothing has to be loaded, whichever are chosen.
        """
        found = [layer.residents() for layer in self._layers()]
        of_layers = [one for one in found if one is not None]
        if len(found) == 1 or not of_layers:
            return of_layers[0] if of_layers else None
        num_resident = torch.stack(of_layers).sum(0) + len(found) - len(of_layers)
        return num_resident * 2 > len(found)

    def say(self, strategy: str | None) -> None:
        """Let statistics and plan say that this strategy follows the cache; None: none does any more."""
        for layer in self._layers():
            layer.follows_cache = strategy

    @property
    def are_offloaded(self) -> bool:
        """Whether the experts of at least one layer are."""
        return bool(self._layers())

    def _layers(self) -> list[OffloadedLayer]:
        if self._found is None:
            base = self._context.base
            modules = [] if base is None else [experts_at(base, path) for path in self.paths]
            self._found = [offloaded(module) for module in modules if isinstance(module, OffloadedExperts)]
        return self._found
