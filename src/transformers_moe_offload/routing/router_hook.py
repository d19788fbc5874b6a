"""Where a strategy and a model meet: hooks around one router.

While the router runs, an `Interception` lets the strategy choose, and observers are told the decision. With neither
strategy nor observers the hooks do nothing; `switching.py` takes them out.
"""

# T tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_moe_offload.errors import MoeOffloadError, UnsupportedModelError
from transformers_moe_offload.hf.cuda_graphs.guards import Capturable
from transformers_moe_offload.hf.few_rows.router import FewRowsRouter, Preferring
from transformers_moe_offload.hf.routers.capture import is_asking
from transformers_moe_offload.kernels.few_rows import Preference
from transformers_moe_offload.routing import hooks
from transformers_moe_offload.routing.answer import Reading, find_reading, read_answer
from transformers_moe_offload.routing.choice import Choice, RouterCall
from transformers_moe_offload.routing.forward import Forward
from transformers_moe_offload.routing.forward_context import ForwardContext
from transformers_moe_offload.routing.interception import Interception, Seen
from transformers_moe_offload.routing.recomputed import PendingForwards
from transformers_moe_offload.routing.residents import Residents
from transformers_moe_offload.routing.sites import Site
from transformers_moe_offload.routing.steps import is_step
from transformers_moe_offload.routing.strategies.cache_aware import CacheAware
from transformers_moe_offload.routing.strategy import RoutingStrategy


class Decision(NamedTuple):
    """What one router did with the tokens of a forward."""

    scores: Tensor
    """(T, E): the scores that experts were ranked by."""
    has_affinities: bool
    experts: Tensor
    """(T, K) int64."""
    weights: Tensor
    """(T, K): the factors of the experts' outputs."""
    hidden: Tensor
    """(T, H): the router's input."""
    is_kept: Tensor | None = None
    """(T, K) bool: False for entries that only fill up a row; None where all count."""


Observer = Callable[[int, Decision], None]
"""Called with the number of the router and what it did."""


class _Watching(threading.local):
    """The routers that run in a thread, innermost last: an interception each, or None if the router is not watched."""

    def __init__(self) -> None:
        self.seen: list[Interception | None] = []


class RouterHook(Preferring, Capturable):
    """The hooks around the router of a site."""

    def __init__(self, site: Site, context: ForwardContext) -> None:
        self.index = site.index
        self.path = site.path
        self.strategy: RoutingStrategy | None = None
        self.observers: list[Observer] = []
        self._first_forward = 0
        self._num_experts = site.num_experts
        self._top_k = site.top_k
        self._has_groups = site.has_groups
        self._context = context
        self._pending = PendingForwards()
        self._memory: Any = None
        """What the strategy remembers, of this router and of others that it was set for."""
        self._residents = Residents(context, site.experts_paths)
        self._watching = _Watching()
        self._reading: Reading | None = None
        """How to read the answers that follow a prompt; None where they have to be watched."""

    def __deepcopy__(self, memo: dict[int, Any]) -> RouterHook:
        copied = object.__new__(RouterHook)
        memo[id(self)] = copied
        vars(copied).update(vars(self))  # strategies are immutable, but for what they remember
        copied._memory = deepcopy(self._memory, memo)
        copied.observers = []  # observers of this model do not observe its copies
        copied._context = deepcopy(self._context, memo)
        copied._residents = Residents(copied._context, self._residents.paths)
        copied._watching, copied._reading, copied._pending = _Watching(), None, PendingForwards()
        copied._follow_texts()
        return copied

    @property
    def is_offloaded(self) -> bool:
        """Whether it routes to experts that are offloaded."""
        return self._residents.are_offloaded

    def put_on(self, site: Site) -> None:
        """Add the hooks. Where the block around the router makes the choice, watching ends when experts are called."""
        hooks.before(site.module, self._enter)
        if site.ends_at is not None:
            hooks.before(site.ends_at, self._reach_experts)
        hooks.after(site.module, self._leave)

    def follow(self, strategy: RoutingStrategy | None, memory: Any = None) -> None:
        """Choose by a strategy, with a memory that it made, from the next forward on; None lets the router choose."""
        self.strategy = strategy
        self._memory = memory
        self._first_forward = self._context.num_forwards
        self._pending = PendingForwards()
        self._follow_texts()
        self._residents.say(str(strategy) if strategy is not None and strategy.follows_cache else None)

    def _follow_texts(self) -> None:
        if self.strategy is not None and self.strategy.knows_texts:
            self._context.follow_texts(self)
        else:
            self._context.stop_following_texts(self)

    @property
    def captured_as(self) -> Hashable | None:
        """A strategy that follows the cache does so on the device: a replay reads the table, and the mean, anew."""
        is_captured = self.strategy is not None and self.strategy.follows_cache and not self.observers
        return (id(self.strategy), id(self._memory)) if is_captured else None

    def preference(self) -> Preference | None:
        """What the compiled kernels are to prefer in the call that is under way, instead of `_choose`."""
        if not isinstance(self.strategy, CacheAware) or self.observers:
            return None
        resident = self._residents() if is_step(self._context.forward) else None
        sums = self._memory.sums(torch.device("cpu"))
        on_host = None if resident is None else resident.cpu()  # where the router is; experts may be elsewhere
        return Preference(on_host, self.strategy.strength_of(self.index), self.strategy.protect, sums)

    def break_off(self) -> None:
        """Stop watching routers of a forward that this thread has not finished: Ctrl-C ends it without any hook."""
        for seen in reversed(self._watching.seen):
            if seen is not None:
                seen.break_off()
        self._watching.seen = [None for seen in self._watching.seen if seen is None]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.break_off()
        is_read = self._reading is not None and self.strategy is None and (self._context.forward.num_before or 0) > 0
        is_left = self._is_left(module, args, kwargs)
        if is_asking() or (self.strategy is None and not self.observers) or is_read or is_left:
            self._watching.seen.append(None)
            return
        choose = partial(self._choose, args, kwargs)
        seen = Interception(self._num_experts, self._top_k, choose, has_groups=self._has_groups)
        self._watching.seen.append(seen)
        seen.__enter__()  # type: ignore[no-untyped-call]

    def _is_left(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the compiled kernels choose as the strategy would, and nothing else is to be watched."""
        if self.observers or not isinstance(self.strategy, CacheAware):
            return False
        if not isinstance(module, FewRowsRouter) or not module.serves(args, kwargs):
            return False
        # Scores beyond the experts are padded, and too many protected ones refused, by the strategy only.
        return module.num_scores == self._num_experts and self.strategy.protect < module.how.choices

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Seen) -> Choice | None:
        if self.strategy is None:
            return None
        hidden = _hidden(args, kwargs)
        forward = self._forward(hidden)
        token_ids, num_tokens = forward.token_ids, len(seen.scores)
        call = RouterCall(
            *seen,
            layer=self.index,
            forward=max(0, forward.number - self._first_forward),
            hidden=hidden,
            token_ids=token_ids.reshape(-1) if token_ids is not None and token_ids.numel() == num_tokens else None,
            texts=self._context.reader.texts(forward, num_tokens) if self.strategy.knows_texts else None,
            is_step=is_step(forward),
            memory=self._memory,
            find_resident=self._residents,
        )
        with torch.no_grad():
            choice = self.strategy.choose(call)
        if choice is not None:
            _check(self.strategy, choice, call)
        return choice

    def _forward(self, hidden: Tensor) -> Forward:
        """The forward that the router is given tokens (T, H) of: the running one, or one that is computed again."""
        forward = self._context.forward
        if not self._context.is_running:
            return self._pending.find(hidden) or forward
        if forward.has_gradients:
            self._pending.note(forward, hidden)
        return forward

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        seen = self._stop_watching()
        if seen is None or output is None:
            if self._reading is not None and self._reading.fits(output) and not is_asking():
                self._read(self._reading, output, _hidden(args, kwargs))
            return None
        outputs = self._answered(output if isinstance(output, tuple) else (output,), seen, _hidden(args, kwargs))
        return outputs if isinstance(output, tuple) else outputs[0]

    def _reach_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = self._stop_watching()
        self._watching.seen.append(None)  # for `_leave`
        if seen is None:
            return None
        given = (*args, *kwargs.values())
        outputs = self._answered(given, seen, _hidden(args, kwargs))
        return outputs[: len(args)], dict(zip(kwargs, outputs[len(args) :], strict=True))

    def _stop_watching(self) -> Interception | None:
        seen = self._watching.seen.pop() if self._watching.seen else None
        if seen is not None:
            seen.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return seen

    def _answered(self, outputs: tuple[Any, ...], seen: Interception, hidden: Tensor) -> tuple[Any, ...]:
        try:
            answer = read_answer(outputs, seen)
        except UnsupportedModelError as error:
            by = "its own choice" if self.strategy is None else f"{self.strategy}"
            raise UnsupportedModelError(f"{self.path} with {by}: {error}") from error
        self._reading = find_reading(answer, seen) if self.observers and self._context.forward.num_before == 0 else None
        # Outside of a forward a layer is recomputed for gradients, and was observed before.
        if self._context.is_running and self.observers:
            assert seen.scores is not None
            assert seen.choice is not None
            is_kept = seen.choice.is_kept
            decision = Decision(seen.scores, seen.has_affinities, answer.experts, answer.weights, hidden, is_kept)
            self._tell(decision)
        return answer.outputs

    def _read(self, reading: Reading, outputs: tuple[Any, ...], hidden: Tensor) -> None:
        """Tell observers about a decision that was not watched."""
        if not self._context.is_running or self.strategy is not None:
            return
        scores = reading.scoring(outputs[reading.logits].detach().float())
        experts, weights = outputs[reading.experts], outputs[reading.weights].detach()
        self._tell(Decision(scores, reading.has_affinities, experts, weights, hidden))

    def _tell(self, decision: Decision) -> None:
        for observe in self.observers:
            observe(self.index, decision)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """(T, H): the router's first argument."""
    given = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(given, Tensor)
    return given.detach().reshape(-1, given.shape[-1])


def _check(strategy: RoutingStrategy, choice: Choice, call: RouterCall) -> None:
    """Raise if the shape or dtype of a strategy's choice is wrong."""
    experts, is_kept = choice.experts, choice.is_kept
    is_integral = not experts.is_floating_point() and experts.dtype == torch.int64
    if experts.dim() != 2 or len(experts) != call.num_tokens or not is_integral or experts.shape[1] < 1:
        raise MoeOffloadError(
            f"{strategy} chose experts {tuple(experts.shape)} of {experts.dtype} for {call.num_tokens} tokens; "
            f"a choice is ({call.num_tokens}, K) of torch.int64"
        )
    if is_kept is not None and (is_kept.shape != experts.shape or is_kept.dtype != torch.bool):
        raise MoeOffloadError(
            f"{strategy} chose experts {tuple(experts.shape)} and keeps {tuple(is_kept.shape)} of {is_kept.dtype}; "
            f"is_kept is bool, of the shape of experts"
        )
    for name, other in (("is_raised", choice.is_raised), ("weights", choice.weights)):
        if other is not None and other.shape != experts.shape:
            raise MoeOffloadError(
                f"{strategy} chose experts {tuple(experts.shape)} with {name} {tuple(other.shape)}; both have one shape"
            )
