"""Decide which forwards of which layers decode on the device, reading experts by address, and run them.

All other forwards wait for the routing on the host, in `compute/forward.py`; the log says why once.
"""

# T tokens, K experts per token, H hidden

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.device_decode.forward import OnDevice

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

    def layer(self, index: int) -> AddressedLayer | None:
        """A layer that can decode on the device; None if it cannot."""
        return self._layers.get(index)

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
            return f"{name} cannot decode on the device: {reason}"
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

    def say(self, reason: str) -> None:
        """Log, once per reason, why a forward does not decode on the device."""
        if reason not in self._said:
            self._said.add(reason)
            logger.info(f"not decoding on the device: {reason}")
