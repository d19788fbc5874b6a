"""Decide which forwards of which layers decode on the device, reading experts by address, and run them.

All other forwards wait for the routing on the host, in `compute/forward.py`; the log says why once.
"""

# T tokens, K experts per token, H hidden

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.device_decode.counters import MOST_PAIRS
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.device_decode.forward import OnDevice
from transformers_moe_offload.kernels import gpu

logger = logging.getLogger(__name__)

MOST_TOKENS = 16
"""Most tokens of a forward that decodes on the device. With more, in a prompt, each expert in a slot serves many."""


@dataclass(frozen=True)
class AddressedLayer:
    """A sparse layer that can decode on the device."""

    index: int
    compute: OnDevice
    engine: DeviceEngine


class Decoding:
    """Decoding on the device, for one model."""

    def __init__(self, layers: Mapping[int, AddressedLayer], obstacles: Mapping[str, str]) -> None:
        """`layers`: index -> layer; `obstacles`: module path -> why that layer cannot decode on the device."""
        self._layers = dict(layers)
        self._obstacles = dict(obstacles)
        self._last = {layer.engine: layer.index for layer in layers.values()}
        """For each engine, the index of the last of its layers in a forward."""
        self._said: set[str] = set()
        self._is_whole = False
        """Whether a whole forward is being captured or replayed; then layers must not call `between_steps`."""
        self.is_traced = False
        """Whether a trace records each visit, which needs the routing on the host."""

    @property
    def engines(self) -> tuple[DeviceEngine, ...]:
        """All engines, each once."""
        return tuple(self._last)

    def layer(
        self, index: int, module: nn.Module, inputs: Sequence[Any], *, needs_grad: bool, is_adapted: bool
    ) -> AddressedLayer | None:
        """The layer if it decodes on the device in this forward, else None."""
        found = self._layers.get(index)
        if found is None:
            return None
        reason = self._not_now(module, inputs, needs_grad=needs_grad, is_adapted=is_adapted)
        if reason is not None:
            self._say(reason)
            return None
        return found

    def compute(
        self, layer: AddressedLayer, module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """hidden (T, H), top_k_index (T, K) int64, top_k_weights (T, K) -> the experts' contribution, (T, H)."""
        engine = layer.engine
        with engine.turn:
            engine.note(layer.index, top_k_index)
            out = layer.compute(module, hidden, top_k_index, top_k_weights, engine.addresses(layer.index))
            if layer.index == self._last[engine] and not self._is_whole:
                engine.between_steps()  # while the device is busy with what was submitted
        return out

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Context for the capture of a whole forward, which computes nothing; other threads wait."""
        with self._whole():
            try:
                yield
            finally:
                for engine in self.engines:
                    engine.forget_notes()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context for the replay of a whole forward; the engines update their caches once it has been submitted."""
        with self._whole():
            for engine in self.engines:
                engine.before_replay()
            yield
            for engine in self.engines:
                engine.between_steps()

    def obstacle(self) -> str | None:
        """Why a whole forward cannot run on the device; None if it can."""
        if self._obstacles:
            name, reason = next(iter(self._obstacles.items()))
            return f"{name} is computed on the host's terms: {reason}"
        return "the model is being traced" if self.is_traced else None

    @contextmanager
    def _whole(self) -> Iterator[None]:
        with ExitStack() as turns:
            for engine in self.engines:
                turns.enter_context(engine.turn)
            self._is_whole = True
            try:
                yield
            finally:
                self._is_whole = False

    def _not_now(self, module: nn.Module, inputs: Sequence[Any], *, needs_grad: bool, is_adapted: bool) -> str | None:
        hidden, top_k_index = inputs[0], inputs[1]
        if hidden.shape[0] > MOST_TOKENS or top_k_index.numel() > MOST_PAIRS:
            return f"forwards of more than {MOST_TOKENS} tokens are computed expert by expert"
        if hidden.dtype not in gpu.TYPES or top_k_index.dtype != torch.int64:
            return f"no kernels take rows of {hidden.dtype} with indices of {top_k_index.dtype}"
        if needs_grad or module.training:
            return "in training experts are computed one by one"
        if is_adapted:
            return "experts to which adapters add are computed one by one"
        if self.is_traced:
            return "while a model is traced the host has to know its routing"
        if torch.is_autocast_enabled(hidden.device.type):
            return "under autocast experts are computed one by one"
        return None

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.info(f"not decoding on the device: {reason}")
