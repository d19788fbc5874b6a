"""What a model is reading while its routers run: the number of the forward, its tokens, and the tokens before them.

One context per model, shared by the hooks around all its routers. It is an attribute of the model, so a copy of the
model has its own.
"""

# B sequences, S their length

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.cuda_graphs.guards import Capturable
from transformers_moe_offload.hf.upstream import arguments, kv_cache, kv_cache_of_output, num_tokens_in
from transformers_moe_offload.routing import hooks, moved_rows
from transformers_moe_offload.routing.forward import Forward, Past
from transformers_moe_offload.routing.moved_rows import Move
from transformers_moe_offload.routing.padding import expect_texts_apart, padding_of
from transformers_moe_offload.routing.text_reader import TextReader


class Running(threading.local):
    """The models and the forward that run in a thread, or ran last in it."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        """The models, the outermost first."""
        self.forward: Forward | None = None


_ATTRIBUTE = "_moe_routing_context"


class Listener(Protocol):
    """Is called where forwards begin and end."""

    def begin(self, context: ForwardContext) -> None:
        """A forward is about to start."""

    def end(self, context: ForwardContext) -> None:
        """A forward has ended; not called for a forward that failed."""


class ForwardContext(Capturable):
    """Counts the forwards of a model and keeps the token ids of the running one, for each thread."""

    def __init__(self, base: nn.Module) -> None:
        self._base = weakref.ref(base)
        self.num_forwards = 0
        """Forwards of all threads so far, running ones included."""
        self._listeners: list[Listener] = []
        self._counting = threading.Lock()
        self._latest = Forward()
        self._running = Running()
        self._pasts: weakref.WeakKeyDictionary[Cache, Past] = weakref.WeakKeyDictionary()
        self._parts: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()
        self.reader = TextReader()
        """Finds the text of every token, while a strategy has to know it."""
        self._at_end: weakref.finalize[Any, nn.Module] | None = None

    @property
    def captured_as(self) -> str | None:
        """Strategies need to know of a captured step only that it is one; listeners are told of every forward."""
        return None if self._listeners else "steps"

    @property
    def base(self) -> nn.Module | None:
        """The model; None once it has been garbage-collected."""
        return self._base()

    def listen(self, listener: Listener) -> None:
        """Call the listener for every forward from now on."""
        if not self._listeners:
            moved_rows.listen(self._note_move)
        self._listeners.append(listener)

    def stop_listening(self, listener: Listener) -> None:
        """Undo `listen`."""
        self._listeners.remove(listener)
        if not self._listeners:
            moved_rows.stop_listening(self._note_move)

    def follow_texts(self, user: object) -> None:
        """Let `reader` find the texts of forwards from now on, for this user."""
        if not self.reader.users:
            self.listen(self.reader)
            base = self._base()
            assert base is not None
            self._at_end = weakref.finalize(base, self.stop_listening, self.reader)  # a model may go with its strategy
            self._at_end.atexit = False
        self.reader.users.add(user)

    def stop_following_texts(self, user: object) -> None:
        """Undo `follow_texts`, if this user has called it."""
        if user in self.reader.users:
            self.reader.users.remove(user)
            if not self.reader.users and self._at_end is not None and self._at_end.detach():
                self.stop_listening(self.reader)

    def _note_move(self, cache: Cache, move: Move | None) -> None:
        past = self._pasts.get(cache)
        if past is None:
            return
        if move is not None:
            past.moves += (move,)
            return
        try:
            past.keep(num_tokens_in(cache))
        except UnsupportedModelError:
            past.keep(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardContext:
        base = memo.get(id(self._base()))
        if base is None:  # only a part of the model is copied, as PEFT does; the copy stays inside the model
            return self
        copied = memo[id(self)] = ForwardContext(base)
        copied.num_forwards = self.num_forwards
        copied._latest = Forward(self.forward.number)
        return copied

    @property
    def forward(self) -> Forward:
        """This thread's forward; in a thread without one (autograd's, which recompute layers), the latest of all."""
        return self._running.forward or self._latest

    @property
    def is_running(self) -> bool:
        """Whether a forward runs in this thread."""
        return self._running.forward is not None and self._running.forward.is_running

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: the model, or a model within it, starts a forward."""
        running = self._running.modules
        if running and id(module) not in self._models_in(running[-1]):  # Ctrl-C ends a forward without calling `end`
            running.clear()
        if running:
            running.append(module)
            return
        past, num_before = self._read_before(module, args, kwargs)
        running.append(module)
        with self._counting:
            forward = Forward(self.num_forwards)
            self.num_forwards += 1
        forward.inputs, forward.is_running = arguments(module, args, kwargs), True
        forward.has_gradients = torch.is_grad_enabled()
        forward.past, forward.num_before = past, num_before
        forward.moves = past.moves
        if num_before is not None or self._listeners:
            past.keep(num_before or 0)
        forward.num_kept = past.num_kept or 0
        self._running.forward = self._latest = forward
        for listener in self._listeners:
            listener.begin(self)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook: the forward that `begin` announced has ended."""
        running = self._running.modules
        if running:
            running.pop()
        forward = self.forward
        if running:
            if forward.is_encoding and module is self._encoder():
                forward.encoded()
            return
        if output is not None:
            past = forward.past
            past.moves = past.moves[len(forward.moves) :]  # kept if the forward failed: it has not read them
            past.num_kept = None
            cache = kv_cache_of_output(output)
            if cache is not None:  # possibly created by the model
                self._pasts[cache] = past
            for listener in self._listeners:
                listener.end(self)
        forward.inputs, forward.is_running = {}, False

    def _read_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Past, int | None]:
        """The texts that a forward continues, and how many tokens of each were read before.

        A KV cache that does not say raises while there are listeners; strategies alone need no positions.
        """
        try:
            cache = kv_cache(module, args, kwargs)
            if cache is None:
                return Past(), 0
            if not self._listeners and _reads_one_token(module, args, kwargs):
                return self._pasts.setdefault(cache, Past()), None  # a static cache would make the host wait
            return self._pasts.setdefault(cache, Past()), num_tokens_in(cache)
        except UnsupportedModelError:
            if self._listeners:
                raise
            return Past(), None

    def _models_in(self, module: nn.Module) -> frozenset[int]:
        """The models that are parts of a model, by identity."""
        found = self._parts.get(module)
        if found is None:
            parts = (part for part in module.modules() if isinstance(part, PreTrainedModel) and part is not module)
            found = self._parts[module] = frozenset(map(id, parts))
        return found

    def embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: tokens are about to be embedded. An encoder's are embedded and routed before its decoder's."""
        if args and isinstance(args[0], Tensor) and args[0].dim() == 2:
            ids = args[0].detach()
            forward, running = self.forward, self._running.modules
            forward.is_encoding = len(running) > 1 and running[-1] is self._encoder()
            if self._listeners:
                forward.is_padding = self._padding(forward, ids)
                expect_texts_apart(forward.inputs.get("position_ids"), forward.is_padding, ids.shape)
                ids = ids.clone()  # the caller may write the next ids into the same tensor
            forward.token_ids = ids

    def _padding(self, forward: Forward, ids: Tensor) -> Tensor | None:
        """Which of the ids that are about to be embedded are padding."""
        is_encoded = forward.inputs.get("encoder_outputs") is not None or forward.has_encoded
        is_decoder = is_encoded and self._encoder() is not None
        mask = forward.inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
        before = 0 if forward.is_encoding else forward.num_before or 0
        return padding_of(mask, ids.shape[0], ids.shape[1], before=before)

    def _encoder(self) -> nn.Module | None:
        """The encoder of a model that has a decoder as well."""
        base = self._base()
        is_with_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        return base.get_encoder() if is_with_decoder and isinstance(base, PreTrainedModel) else None


def _reads_one_token(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward reads one token of each text."""
    given = arguments(module, args, kwargs)
    found = (given.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds"))
    ids = next((value for value in found if isinstance(value, Tensor)), None)
    return ids is not None and ids.dim() >= 2 and ids.shape[1] == 1


def forward_context_of(base: nn.Module) -> ForwardContext:
    """The context of a model, made and hooked up if there is none."""
    context = vars(base).get(_ATTRIBUTE)
    if context is None:
        context = vars(base)[_ATTRIBUTE] = ForwardContext(base)
        # Inner models as well: the decoder may be called without its head.
        for module in base.modules():
            if isinstance(module, PreTrainedModel):
                hooks.before(module, context.begin)
                hooks.after(module, context.end)
        for embedding in _embeddings(base):
            hooks.before(embedding, context.embed)
    assert isinstance(context, ForwardContext)
    return context


def drop_forward_context(base: nn.Module) -> None:
    """Take the hooks of a model's context out again."""
    context = vars(base).pop(_ATTRIBUTE, None)
    if context is not None:
        hooks.remove(base, context)


def _embeddings(base: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            try:
                embedding = module.get_input_embeddings()
            except (NotImplementedError, AttributeError):  # towers that do not embed tokens
                continue
            if isinstance(embedding, nn.Module) and hasattr(embedding, "num_embeddings"):
                found[id(embedding)] = embedding
    return list(found.values())
