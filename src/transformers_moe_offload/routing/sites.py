"""Find where a model routes: one site for each router, whether or not the model is offloaded.

A router is a module beside the experts. `interception.py` finds out while it runs which of its functions choose; this
file only finds the module to watch and the sparse layers that follow its choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.loading.discover import experts_of
from transformers_moe_offload.hf.routers.find import find_router
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.routing.trace_file import MAX_CHOICES, RouterFacts


@dataclass(frozen=True, eq=False)
class Site:
    """One router of a model, and what it routes to."""

    index: int
    """Which router, in the order of the model."""
    path: str
    """Path of the module that makes the choice."""
    module: nn.Module
    num_experts: int
    top_k: int | None
    """How many experts a token takes; None where the model does not say."""
    layers: tuple[int, ...]
    """The sparse layers that follow its choice, as the cache counts them."""
    experts_paths: tuple[str, ...]
    """Paths of the experts modules of those layers."""
    ends_at: nn.Module | None = None
    """The experts module, where the block around router and experts makes the choice; None where the router does."""

    @property
    def has_groups(self) -> bool:
        """Whether the router compares groups of experts before it chooses."""
        return any(isinstance(getattr(self.module, name, None), int) for name in ("num_group", "n_group"))


def unwrapped(model: Any) -> nn.Module:
    """The Transformers model inside PEFT's wrapper, or the model itself if there is no wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(base, nn.Module)
    return base


def find_sites(model: Any) -> list[Site]:
    """All routers of a model; raises `UnsupportedModelError` for none, or for a choice that cannot be replaced."""
    base = unwrapped(model)
    by_router: dict[str, list[tuple[int, str, int]]] = {}
    for layer, (path, _, num_experts) in enumerate(experts_of(base)):
        by_router.setdefault(_router_path(base, path), []).append((layer, path, num_experts))
    if not by_router:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no routed experts, so it has no router; load a mixture of experts"
        )
    return [_site(base, index, path, experts) for index, (path, experts) in enumerate(by_router.items())]


def select(sites: list[Site], layers: int | str | Iterable[int | str] | None) -> list[Site]:
    """The sites that `layers` names: numbers of routers (negative ones from the end), module paths, or None for all."""
    if layers is None:
        return sites
    asked = [layers] if isinstance(layers, int | str) else list(layers)
    if not asked:
        raise ConfigError("layers=[] names no router; name at least one, or leave `layers` out for all of them")
    found = {site.index: site for layer in asked for site in [_named(sites, layer)]}
    return [found[index] for index in sorted(found)]


def facts_of(site: Site) -> RouterFacts:
    """What a recording says of a router."""
    if site.num_experts > MAX_CHOICES:
        raise UnsupportedModelError(
            f"{site.path} chooses among {site.num_experts:,} experts; a recording supports at most {MAX_CHOICES:,}: "
            "leave it out with `layers`"
        )
    own = site.index, site.path, site.num_experts, site.num_experts, site.top_k
    return RouterFacts(*own, has_affinities=False, layers=site.layers, experts_paths=site.experts_paths)


def _named(sites: list[Site], layer: int | str) -> Site:
    if isinstance(layer, str):
        for site in sites:
            if layer in (site.path, *site.experts_paths):
                return site
        raise ConfigError(f"layers names {layer!r}, but no router is at that path; the first is at {sites[0].path!r}")
    if isinstance(layer, bool) or not isinstance(layer, int) or not -len(sites) <= layer < len(sites):
        raise ConfigError(f"layers names router {layer!r}, but the model has routers 0 to {len(sites) - 1}")
    return sites[layer]


def _site(base: nn.Module, index: int, path: str, experts: list[tuple[int, str, int]]) -> Site:
    module, first = base.get_submodule(path), experts[0][1]
    if hasattr(module, "second_expert_policy"):
        raise UnsupportedModelError(
            f"{type(base).__name__}: {path} returns a mask of experts, and the experts module reads its zeros and "
            f"ones as indices (NLLB-MoE, Transformers 5.23), so experts 0 and 1 run whatever is chosen; choose a "
            f"model whose experts follow the router's choice"
        )
    return Site(
        index,
        path,
        module,
        num_experts=experts[0][2],
        top_k=experts_per_token(base, first) or vars(module).get("top_k"),
        layers=tuple(layer for layer, _, _ in experts),
        experts_paths=tuple(path for _, path, _ in experts),
        ends_at=base.get_submodule(first) if first.startswith(f"{path}.") else None,
    )


def _router_path(base: nn.Module, experts: str) -> str:
    """The path of the module that chooses among some experts: their router, or the block around it."""
    router = find_router(base, experts)
    if router is None:
        raise UnsupportedModelError(
            f"{type(base).__name__}: no router beside {experts}; a router is recognised by a matrix with a row for "
            f"each expert, or by the name gate or router, its own or its class's"
        )
    block = router.path.rpartition(".")[0]
    # DBRX: the router only scores, and the block chooses
    return block if hasattr(base.get_submodule(block), "route_tokens_to_experts") else router.path
