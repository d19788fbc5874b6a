"""All that a forward of one sparse layer needs, put together when the caches are built, and not changed afterwards.

A layer computes by the first of its paths (`paths/`) that serves the call. `caches.py` makes a new `LayerForward` when
the layer is moved or cast, or its cache is built anew.
"""

# T tokens, H hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.deltas import Adaptation
from transformers_moe_offload.formats.base import LayerCodecs


class Call(NamedTuple):
    """One call of an experts module."""

    module: nn.Module
    inputs: tuple[Any, ...]
    """The arguments of its forward; hidden states (T, H) first."""
    adaptation: Adaptation
    """What adapters add to the experts in this call, and the layer's own experts; `NOTHING` if there are none."""
    needs_grad: bool
    """Whether autograd records the call."""
    is_changed: bool = False
    """Whether attributes of the module were set since its experts were offloaded: it may compute something else."""


class Path(Protocol):
    """One way to compute a layer."""

    def serves(self, call: Call) -> bool:
        """Whether this way computes what the call asks for."""

    def forward(self, call: Call) -> Tensor:
        """The experts' contribution to each token, (T, H)."""


Started = Callable[[Sequence[int]], None]
"""Called with the experts that a layer wants, once their loads are in flight."""


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one sparse layer, as its paths use them."""

    index: int
    cache: ExpertCache
    codecs: LayerCodecs
    """How each expert is stored."""
    dtype: torch.dtype
    """The dtype that experts have in a forward."""
    look_ahead: Callable[[Tensor], Started] | None
    """Starts prefetching from a layer's hidden states, (..., H); None without prefetching."""
    residents: Callable[[], Tensor | None]
    """(E,) bool, the experts that are resident or loading, for strategies that prefer these (`residents.py`)."""

    def cast_for(self, hidden: Tensor) -> torch.dtype | None:
        """The dtype that experts are cast to for rows like these; None if they have it, or autocast casts.

        Dtypes differ after `parameter.data = parameter.data.float()`, as in PEFT's `prepare_model_for_kbit_training`,
        which reaches all parameters but offloaded experts. The rows then have the new dtype: experts are cast to it
        when used, and stay unchanged in the cache. (`model.float()` casts them in the cache.)
        """
        if hidden.dtype == self.dtype or torch.is_autocast_enabled(hidden.device.type):
            return None
        return hidden.dtype


@dataclass(frozen=True)
class LayerForward:
    """What computes one sparse layer on one device."""

    device: torch.device
    experts: LayerExperts
    paths: tuple[Path, ...]
    """In order of preference; the last one serves every call."""
