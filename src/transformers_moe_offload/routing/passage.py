"""What a model is reading while its routers run: which forward it is, and the tokens of it.

One passage per model, shared by all its seams. It hangs on the model itself, so a copy of the model has its own.
"""

# B sequences, S their length

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from transformers_moe_offload.routing.hooks import Hooks

_ATTRIBUTE = "_moe_routing_passage"


class Listener(Protocol):
    """Wants to know where forwards begin and end."""

    def begin(self, passage: Passage) -> None:
        """A forward is about to start."""

    def end(self, passage: Passage) -> None:
        """It is over; not called for one that failed."""


class _Running(threading.local):
    """The models that run in a thread, the outermost first, by identity."""

    def __init__(self) -> None:
        self.modules: list[int] = []


class Passage:
    """Counts the forwards of a model and keeps the token ids of the one that runs."""

    def __init__(self, base: nn.Module) -> None:
        self._base = weakref.ref(base)
        self.forward = -1
        """The number of the forward that runs, or ran last."""
        self.is_running = False
        self.token_ids: Tensor | None = None
        """(B, S) int64: what was embedded last; None where a forward was given something else than tokens."""
        self.num_before = 0
        """Tokens of the same texts that earlier forwards have read."""
        self.inputs: dict[str, Any] = {}
        """The keyword arguments of the forward that runs."""
        self.listeners: list[Listener] = []
        self._running = _Running()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        twin = memo.get(id(self._base()))
        if twin is None:  # a part of the model is copied, as PEFT does, and stays within it
            return self
        copied = memo[id(self)] = Passage(twin)
        copied.forward = self.forward
        return copied

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: the model, or a model within it, starts a forward."""
        running = self._running.modules
        if id(module) in running:  # no hook is called when Ctrl-C ends a forward
            running.clear()
        running.append(id(module))
        if len(running) > 1:
            return
        self.forward += 1
        self.is_running = True
        self.inputs, self.token_ids = kwargs, None
        cache = kwargs.get("past_key_values")
        self.num_before = int(cache.get_seq_length()) if cache is not None else 0
        for listener in self.listeners:
            listener.begin(self)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook: that forward is over."""
        running = self._running.modules
        if running:
            running.pop()
        if running:
            return
        if output is not None:
            for listener in self.listeners:
                listener.end(self)
        self.inputs, self.is_running = {}, False

    def embed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: tokens are being embedded. An encoder's come before its decoder's, and are routed before, too."""
        if args and isinstance(args[0], Tensor) and args[0].dim() == 2:
            self.token_ids = args[0].detach()


def passage_of(base: nn.Module) -> Passage:
    """The passage of a model, made and hooked up if there is none."""
    passage = vars(base).get(_ATTRIBUTE)
    if passage is None:
        passage = vars(base)[_ATTRIBUTE] = Passage(base)
        hooks = Hooks(base)
        # Models within models as well: somebody may call the decoder without its head.
        for module in base.modules():
            if isinstance(module, PreTrainedModel):
                hooks.before(module, passage.begin)
                hooks.after(module, passage.end)
        for embedding in _embeddings(base):
            hooks.before_args(embedding, passage.embed)
    assert isinstance(passage, Passage)
    return passage


def drop_passage(base: nn.Module) -> None:
    """Take the hooks of a model's passage out again."""
    passage = vars(base).pop(_ATTRIBUTE, None)
    if passage is not None:
        Hooks(base).remove(passage)


def _embeddings(base: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            try:
                embedding = module.get_input_embeddings()
            except (NotImplementedError, AttributeError):  # towers that embed something else than tokens
                continue
            if isinstance(embedding, nn.Module) and hasattr(embedding, "num_embeddings"):
                found[id(embedding)] = embedding
    return list(found.values())
