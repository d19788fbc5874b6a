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


class _Forward:
    """One forward, or the time before the first."""

    def __init__(self, number: int = -1) -> None:
        self.number = number
        self.is_running = False
        self.token_ids: Tensor | None = None
        self.num_before = 0
        self.inputs: dict[str, Any] = {}


class _Running(threading.local):
    """What runs in a thread, or ran last in it."""

    def __init__(self) -> None:
        self.modules: list[int] = []
        """The models, the outermost first, by identity."""
        self.forward: _Forward | None = None


class Passage:
    """Counts the forwards of a model and keeps the token ids of the one that runs: in each thread, its own."""

    def __init__(self, base: nn.Module) -> None:
        self._base = weakref.ref(base)
        self.num_forwards = 0
        """Forwards of all threads so far, the ones that run included."""
        self.listeners: list[Listener] = []
        self._counting = threading.Lock()
        self._latest = _Forward()
        self._running = _Running()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        twin = memo.get(id(self._base()))
        if twin is None:  # a part of the model is copied, as PEFT does, and stays within it
            return self
        copied = memo[id(self)] = Passage(twin)
        copied.num_forwards = self.num_forwards
        copied._latest = _Forward(self.forward)
        return copied

    @property
    def forward(self) -> int:
        """The number of the forward that runs, or ran last."""
        return self._forward.number

    @property
    def is_running(self) -> bool:
        """Whether a forward runs in this thread."""
        return self._running.forward is not None and self._running.forward.is_running

    @property
    def token_ids(self) -> Tensor | None:
        """(B, S) int64: what was embedded last; None where a forward was given something else than tokens."""
        return self._forward.token_ids

    @property
    def num_before(self) -> int:
        """Tokens of the same texts that earlier forwards have read."""
        return self._forward.num_before

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the forward that runs."""
        return self._forward.inputs

    @property
    def _forward(self) -> _Forward:
        """This thread's; the latest of all for a thread that has none, as autograd's that compute layers again."""
        return self._running.forward or self._latest

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: the model, or a model within it, starts a forward."""
        running = self._running.modules
        if id(module) in running:  # no hook is called when Ctrl-C ends a forward
            running.clear()
        running.append(id(module))
        if len(running) > 1:
            return
        with self._counting:
            forward = _Forward(self.num_forwards)
            self.num_forwards += 1
        cache = kwargs.get("past_key_values")
        forward.inputs, forward.is_running = kwargs, True
        forward.num_before = int(cache.get_seq_length()) if cache is not None else 0
        self._running.forward = self._latest = forward
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
        self._forward.inputs, self._forward.is_running = {}, False

    def embed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: tokens are being embedded. An encoder's come before its decoder's, and are routed before, too."""
        if args and isinstance(args[0], Tensor) and args[0].dim() == 2:
            ids = args[0].detach()
            self._forward.token_ids = ids.clone() if self.listeners else ids  # the caller may write the next ones there


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
