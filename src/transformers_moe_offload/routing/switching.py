"""Put strategies into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import hooks
from transformers_moe_offload.routing.forward_context import drop_forward_context, forward_context_of
from transformers_moe_offload.routing.router_hook import Observer, RouterHook
from transformers_moe_offload.routing.sites import Site, find_sites, select, unwrapped
from transformers_moe_offload.routing.strategy import RoutingStrategy, make_strategy

Layers = int | str | Iterable[int | str] | None


class RoutingChange:
    """A change of strategies that a `with` block takes back when it ends. Without one it stays until `reset`."""

    def __init__(self, model: Any, before: Mapping[int, RoutingStrategy | None], strategy: RoutingStrategy) -> None:
        self._model = model
        self._before = before
        self.strategy = strategy

    def __enter__(self) -> RoutingStrategy:
        return self.strategy

    def __exit__(self, *_: object) -> None:
        base = unwrapped(self._model)
        sites = find_sites(base)
        memories = {id(strategy): strategy.memory() for strategy in self._before.values() if strategy is not None}
        for index, strategy in self._before.items():
            router_hook_at(base, sites[index]).follow(strategy, memories.get(id(strategy)))
        _tidy(base)

    def __repr__(self) -> str:
        return f"{self.strategy} on {len(self._before)} routers"


def set_routing(model: Any, strategy: str | RoutingStrategy, layers: Layers = None, **options: Any) -> RoutingChange:
    """Let another strategy choose the experts of a model's tokens, from the next forward on.

        routing.set_routing(model, "random", seed=1)
        with routing.set_routing(model, "top_k", k=4, layers=[0, 1]):
            ...

    `strategy` is a registered name, with its `options`, or a `RoutingStrategy`. `layers` are numbers or module paths of
    routers; None means all. Routers keep their scores, and the way in which they compute weights from the scores of the
    chosen experts. Works on plain and offloaded models, also inside PEFT's wrapper.

    Raises `ConfigError` for an invalid option or layer, and `UnsupportedModelError` for a model whose choice cannot be
    replaced; then nothing has changed.
    """
    made = make_strategy(strategy, options)
    base = unwrapped(model)
    found = find_sites(base)
    sites = select(found, layers)
    made.check_model(len(found))
    for site in sites:
        made.check(site.index, site.num_experts, site.top_k)
    router_hooks = [router_hook_at(base, site) for site in sites]
    before = {hook.index: hook.strategy for hook in router_hooks}
    if made.follows_cache and not any(hook.is_offloaded for hook in router_hooks):
        _tidy(base)
        raise ConfigError(
            f"{made} chooses by what is in the cache, and the experts of {type(base).__name__} are not "
            f"offloaded; load it with moe_offload=OffloadConfig(...)"
        )
    chosen, memory = (None, None) if made.is_neutral else (made, made.memory())
    for hook in router_hooks:
        hook.follow(chosen, memory)
    _tidy(base)
    return RoutingChange(model, before, made)


def reset(model: Any, layers: Layers = None) -> None:
    """Let the routers choose for themselves again; without `layers`, all of them. Recordings go on."""
    base = unwrapped(model)
    asked = None if layers is None else {site.index for site in select(find_sites(base), layers)}
    for hook in hooks.owners(base, RouterHook):
        if asked is None or hook.index in asked:
            hook.follow(None)
    _tidy(base)


def followed(model: Any) -> dict[int, RoutingStrategy]:
    """The strategies that routers follow now, by the number of the router."""
    found = hooks.owners(unwrapped(model), RouterHook)
    return {hook.index: hook.strategy for hook in found if hook.strategy is not None}


def observe(model: Any, sites: list[Site], observer: Observer) -> None:
    """Let an observer see every decision of some routers."""
    base = unwrapped(model)
    for site in sites:
        router_hook_at(base, site).observers.append(observer)


def stop_observing(model: Any, observer: Observer) -> None:
    """Undo `observe`."""
    base = unwrapped(model)
    for hook in hooks.owners(base, RouterHook):
        if observer in hook.observers:
            hook.observers.remove(observer)
    _tidy(base)


def router_hook_at(base: nn.Module, site: Site) -> RouterHook:
    """The hook around a router, put there if there is none."""
    for hook in hooks.owners(site.module, RouterHook):
        if hook.index == site.index:
            return hook
    hook = RouterHook(site, forward_context_of(base))
    hook.put_on(site)
    return hook


def _tidy(base: nn.Module) -> None:
    """Take out the hooks that do nothing any more."""
    router_hooks = hooks.owners(base, RouterHook)
    idle = [hook for hook in router_hooks if hook.strategy is None and not hook.observers]
    for hook in idle:
        hook.break_off()
        hooks.remove(base, hook)
    if len(idle) == len(router_hooks):
        drop_forward_context(base)
