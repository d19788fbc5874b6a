"""The call that `generate` makes for each token in place of the model, to capture and replay whole steps.

Transformers asks a model for its compiled call when it decodes with a static cache (`COMPILED_CALL` in
`hf/upstream.py`). `DecodeSteps` returns a `DecodeStep`, which captures the model's forward, compiled if there is a
compile config. Steps that cannot be captured run eagerly, and the log says why once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from transformers import CompileConfig

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.hf.cuda_graphs.captured import CapturedStep, num_tokens, past_in, signature
from transformers_moe_offload.hf.cuda_graphs.graph import as_recorded
from transformers_moe_offload.hf.cuda_graphs.guards import state_of, watched
from transformers_moe_offload.hf.cuda_graphs.static_cache import unfit
from transformers_moe_offload.hf.decode.decoding import MOST_TOKENS, Decoding

logger = logging.getLogger(__name__)

MOST_STEPS = 4
"""Most captured steps that are kept, each with a KV cache of its own. More would be for lengths that occur once."""

EAGER_STEPS = 1
"""Eager steps before one is captured: they compile kernels, and libraries allocate their workspaces."""

COMPILED_STEPS = 3
"""Steps before a capture with `torch.compile`: the first compiles for the numbers it sees, the second again with those
that changed as symbols, the third runs the result as it will be captured."""


class DecodeSteps:
    """A model's `DecodeStep`s, one for each set of compile options."""

    def __init__(self, model: Callable[[], Any], decoding: Callable[[], Decoding]) -> None:
        """`model` and `decoding` return the model and what of it decodes on the device, as they are at a step. In a
        copy of the model they are the copy's: bound methods follow what they are bound to."""
        self._model = model
        self._decoding = decoding
        self._steps: list[tuple[dict[str, Any] | None, DecodeStep]] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeSteps:
        copied = DecodeSteps(deepcopy(self._model, memo), deepcopy(self._decoding, memo))
        memo[id(self)] = copied
        return copied

    def get_compiled_call(self, compile_config: CompileConfig | None = None) -> DecodeStep:
        """Replaces the model's method of this name, which `generate` calls when a generation begins."""
        options = None if compile_config is None else options_of(compile_config)
        with self._lock:
            step = next((step for known, step in self._steps if known == options), None)
            if step is None:
                step = DecodeStep(self._model, self._decoding, options)
                self._steps.append((options, step))
        step.begin()
        return step

    def forget(self) -> None:
        """Drop all captured steps."""
        for _, step in self._steps:
            step.forget()


class DecodeStep:
    """A model's forward that captures steps and replays them."""

    def __init__(
        self,
        model: Callable[[], Any],
        decoding: Callable[[], Decoding],
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`compile_options` are keyword arguments for `torch.compile`; None does not compile the model."""
        self._model = model
        self._decoding_now = decoding
        self._compile_options = compile_options
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.RLock()
        self._captured: list[tuple[Hashable, CapturedStep]] = []
        self._num_eager: dict[Hashable, int] = {}
        self._decoding: Decoding | None = None
        self._state: Hashable = None
        """`state_of` the model when the steps were captured."""
        self._obstacle: str | None = None
        """Why no step of the running generation can be captured; None if steps can."""
        self._refused: set[Hashable] = set()
        self._said: set[str] = set()
        self.num_captured = 0
        """Steps captured so far."""
        self.num_replayed = 0

    def begin(self) -> None:
        """Begin a generation: keep the captured steps if the model's state has not changed."""
        with self._lock:
            model = self._model()
            state = state_of(model)
            if state != self._state:
                self.forget()
            self._state = state
            self._obstacle = watched(model)

    def forget(self) -> None:
        """Drop all captured and compiled steps."""
        with self._lock:
            self._captured.clear()
            self._compiled = None
            self._num_eager.clear()
            self._refused.clear()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's outputs."""
        with self._lock:
            decoding = self._decoding_now()
            if decoding is not self._decoding:  # layers have moved
                self.forget()
                self._decoding = decoding
            step = self._step(args, inputs)
            if isinstance(step, CapturedStep):
                with decoding.replaying():
                    outputs = step(inputs)
                self.num_replayed += 1
                return outputs
        with as_recorded() if step is self._compiled else nullcontext():
            return step(*args, **inputs)

    def _step(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Callable[..., Any]:
        """A captured step for these inputs, captured now if enough have run eagerly; else the callable to run."""
        plain = self._model()
        obstacle = self._obstacle or self._decoding_now().obstacle() or _hindered(args, inputs)
        key = signature(inputs) if obstacle is None else None
        if key is None:
            self._say(f"steps are not captured: {obstacle or 'inputs that are neither tensors nor plain values'}")
            return plain
        for other, step in self._captured:
            if other == key and step.serves(past_in(inputs)):
                return step
        if key in self._refused:
            return plain
        self._num_eager[key] = self._num_eager.get(key, 0) + 1
        call = self._call(plain)
        if self._num_eager[key] <= (EAGER_STEPS if call is plain else COMPILED_STEPS):
            return call
        return self._capture(key, call, inputs)

    def _call(self, model: Any) -> Callable[..., Any]:
        """The callable to capture: the model, or its compiled call."""
        if self._compile_options is None:
            return model
        if self._compiled is None:
            self._compiled = torch.compile(model.__call__, **self._compile_options)
        return self._compiled

    def _capture(self, key: Hashable, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[..., Any]:
        model = self._model()
        try:
            with self._decoding_now().capturing():
                step = CapturedStep(call, inputs, model.device)
        except (RuntimeError, MoeOffloadError) as error:  # torch's for operations that a graph cannot capture, and ours
            self._refused.add(key)
            self._say(f"steps are not captured: a CUDA graph cannot capture {type(model).__name__}: {error}")
            return model
        self._captured = [*self._captured, (key, step)][-MOST_STEPS:]
        self.num_captured += 1
        return step

    def _say(self, what: str) -> None:
        """Log a warning once."""
        if what not in self._said:
            self._said.add(what)
            logger.warning(what)


def _hindered(args: tuple[Any, ...], inputs: Mapping[str, Any]) -> str | None:
    """Why a call cannot be captured; None if it can."""
    cache = past_in(inputs)
    if args or cache is None or all(inputs.get(name) is None for name in ("input_ids", "inputs_embeds")):
        return "the model was not called with tokens and a KV cache by name"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    reason = unfit(cache)
    if reason is not None:
        return reason
    if num_tokens(inputs) > MOST_TOKENS:
        return f"forwards of more than {MOST_TOKENS} tokens are not on the device"
    if inputs.get("position_ids") is None and any(layer.is_sliding for layer in cache.layers):
        return "without position_ids the model counts positions in Python"
    return None


_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of `torch.compile` that capture CUDA graphs -> the same without: the whole step is captured here."""


def options_of(config: CompileConfig) -> dict[str, Any] | None:
    """Keyword arguments for `torch.compile`; None for backend "eager", which compiles nothing."""
    if config.backend == "eager":
        return None
    options = config.to_dict()
    return options | {"mode": _WITHOUT_GRAPHS.get(options["mode"], options["mode"])}
