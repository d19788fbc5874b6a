"""Build and drop the caches of a model with their engines, host sides and prefetcher, and what computes each layer.

They are built when first needed, and dropped when layers have moved; statistics outlive them. `planning.py` decides
their sizes; `handle.py` calls this when caches are needed, and holds the sources of experts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from transformers_moe_offload.backward.weights import Lenders
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.cache.capacity import most_used
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.compute.one_call import OneCall, activation_for_one_call
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import ConfigError, PageLockError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hf.decode.decoding import Decoding
from transformers_moe_offload.hf.decode.engines import addressed_layers, build_engines, obstacles_of, report
from transformers_moe_offload.hf.model.experts_module import OffloadedLayer, experts_at
from transformers_moe_offload.hf.model.host_sides import host_sides
from transformers_moe_offload.hf.model.layer_forward import LayerExperts, LayerForward, Path
from transformers_moe_offload.hf.model.lookahead import Lookahead, look_ahead_in
from transformers_moe_offload.hf.model.module_paths import is_in_place
from transformers_moe_offload.hf.model.paths.device import DevicePath
from transformers_moe_offload.hf.model.paths.eager import EagerPath
from transformers_moe_offload.hf.model.paths.fast import FastPath
from transformers_moe_offload.hf.model.paths.one_call import OneCallPath
from transformers_moe_offload.hf.model.paths.training import TrainingPath
from transformers_moe_offload.hf.model.placements import placements_of
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.hf.model.planning import make_plan, tried_out, without_arenas
from transformers_moe_offload.hf.model.pools import build_caches
from transformers_moe_offload.hf.model.residents import residents_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hybrid.cpu_experts import HostSide
from transformers_moe_offload.kernels.layer import Workspace
from transformers_moe_offload.stats import CacheStats, LayerStats
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.system.forks import FORKS, Rank
from transformers_moe_offload.tracing import TraceRecorder


class LayerCaches:
    """The caches that serve the sparse layers of one model."""

    def __init__(self, experts: Sequence[OffloadedLayer]) -> None:
        """`experts`: what the experts modules of the model hold."""
        self._experts = list(experts)
        self._lenders = Lenders(self.load_ahead)
        self._of_layer: dict[int, ExpertCache] = {}
        self._host_sides: dict[int, HostSide] = {}
        self._lookahead: Lookahead | None = None
        self._engines: dict[int, DeviceEngine] = {}
        self.decoding = Decoding({}, {})
        """The layers that decode on the device."""
        self._workspaces: dict[ExpertCache, Workspace] = {}
        self._recorder: TraceRecorder | None = None
        self._kept_stats: dict[int, LayerStats] = {}
        self.plan: OffloadPlan | None = None
        """The plan that has been built; None unless all of it has."""
        self._building = FORKS.with_lock(threading.RLock(), Rank.BUILDING)
        self.resizing = FORKS.with_lock(threading.Lock(), Rank.RESIZING)
        """Held by the thread that changes the size of the caches, and the config with it."""

    @property
    def _layers(self) -> list[SparseLayer]:
        return [experts.layer for experts in self._experts]

    def build(self, model: Any, by_layer: Mapping[int, LayerSource], config: OffloadConfig) -> OffloadPlan:
        """Build empty caches unless another thread has; raises `CapacityError` if the budget is too small."""
        with self._building:
            if self.plan is None and (self._engines or self._host_sides):  # `drop` was interrupted
                self.drop(keep_stats=False)
            return self.plan or self._build(model, by_layer, config)

    def _build(self, model: Any, by_layer: Mapping[int, LayerSource], config: OffloadConfig) -> OffloadPlan:
        sources = list(by_layer.values())
        obstacles = obstacles_of(self._layers, by_layer, config)
        plan = tried_out(make_plan(placements_of(self._layers, by_layer, config, obstacles), config), sources, config)
        if plan.arena_bytes:
            try:
                self._engines = build_engines(plan, sources, config)
            except PageLockError as error:
                plan = without_arenas(plan, config, str(error))
        if plan.arena_refused is not None:
            obstacles = {layer.name: plan.arena_refused for layer in self._layers} | obstacles
        try:
            report(obstacles, len(self._layers), config)
            addressed = addressed_layers(model, self._layers, by_layer, self._engines, obstacles)
            self.decoding = Decoding(addressed, obstacles)
            self._of_layer, host = build_caches(plan, sources, config)
            self._of_layer |= {layer: engine.cache for layer, engine in self._engines.items()}
            self._host_sides = host_sides(model, self._layers, plan, host, config)
            in_place = [experts.layer.index for experts in self._experts if is_in_place(model, experts)]
            specs = {layer: by_layer[layer].spec for layer in in_place}
            self._lookahead = look_ahead_in(model, config.prefetch, self._of_layer, specs)
            for index, stats in self._kept_stats.items():
                self._of_layer[index].stats[index] = stats
            self.record(self._recorder)
            for experts in self._experts:
                experts.current = self._forward_of(model, experts, by_layer[experts.layer.index])
        except BaseException:
            self.drop(keep_stats=False)
            raise
        self._kept_stats = {}
        self.plan = plan
        return plan

    def _forward_of(self, model: Any, experts: OffloadedLayer, source: LayerSource) -> LayerForward:
        """What computes a layer, with the caches that have been built."""
        layer = experts.layer
        found = LayerExperts(
            layer.index,
            self._of_layer[layer.index],
            source.codecs,
            torch_dtype(source.spec.fields[0].dtype),
            None if self._lookahead is None else partial(self._lookahead.started, layer.index),
            self._residents(layer),
        )
        lend = partial(self._lenders.lend, layer.index, lambda: experts.ready(layer.device).experts)
        if layer.mlp is None:
            return LayerForward(layer.device, found, (EagerPath(layer, source.spec, found, lend),))
        addressed = self.decoding.layer(layer.index)
        on_device = None if addressed is None else DevicePath(self.decoding, addressed)
        module = experts_at(model, layer.name)
        one_call = self._one_call(layer, layer.mlp, module, source, found) if layer.device.type == "cpu" else None
        fast = FastPath(layer.mlp, found, self._host_sides.get(layer.index))
        paths: tuple[Path | None, ...] = (on_device, one_call, fast, TrainingPath(layer.mlp, found, lend))
        return LayerForward(layer.device, found, tuple(path for path in paths if path is not None))

    def _residents(self, layer: SparseLayer) -> Callable[[], torch.Tensor | None]:
        """Which experts of a layer need not be loaded; a layer that decodes on the device reads it there."""
        engine = self._engines.get(layer.index)
        if engine is not None:
            return partial(engine.in_slots, layer.index)
        return partial(residents_of, self._of_layer[layer.index], layer.index, layer.device)

    def _one_call(
        self, layer: SparseLayer, mlp: ExpertMlp, module: nn.Module, source: LayerSource, experts: LayerExperts
    ) -> OneCallPath | None:
        """The path of a layer on a CPU whose experts the compiled kernels compute by one call; None if they cannot."""
        activation = activation_for_one_call(mlp, module, source.spec, source.codecs)
        if activation is None:
            return None
        workspace = self._workspaces.setdefault(experts.cache, Workspace())
        sure_for = experts.cache.slots.sure_for
        one_call = OneCall(mlp, source.spec, source.codecs, activation, workspace, sure_for)
        experts.cache.tables.by_layer[layer.index] = one_call
        return OneCallPath(one_call, experts)

    def drop(self, *, keep_stats: bool) -> None:
        """Free slots and threads; `build` makes new ones."""
        for experts in self._experts:
            experts.current = None
        self.plan = None
        if keep_stats:
            self._kept_stats |= {layer.index: self.stats_of(layer) for layer in self._layers}
        self.decoding = Decoding({}, {})
        for side in set(self._host_sides.values()):
            side.compute.close()
        for engine in set(self._engines.values()):
            engine.close()
        self._of_layer, self._host_sides, self._engines, self._workspaces = {}, {}, {}, {}
        self._lookahead = None

    def resize(self, sources: Mapping[int, LayerSource], config: OffloadConfig) -> None:
        """Give the caches the budget of another config that differs in nothing else; the caller holds `resizing`.

        Raises `CapacityError` or `ConfigError`, and changes nothing, if the budget does not work.
        """
        held: Counter[torch.device] = Counter()
        for pool in () if self.plan is None else self.plan.pools:
            held[pool.device] += 0 if pool.is_mapped else pool.cache_bytes
        obstacles = obstacles_of(self._layers, sources, config)
        plan = make_plan(placements_of(self._layers, sources, config, obstacles), config, held)
        if self.plan is None:
            return
        num_slots = {pool.layers: pool.num_slots for pool in plan.pools}
        pools = tuple(replace(pool, num_slots=num_slots[pool.layers]) for pool in self.plan.pools)
        try:
            self._give_slots(pools)
        except BaseException:
            self._give_slots(self.plan.pools)
            raise
        self.plan = replace(self.plan, pools=pools, budget_bytes=plan.budget_bytes)

    def _give_slots(self, pools: Iterable[PoolPlan]) -> None:
        """Change the number of slots of pools: shrinking pools first, because growing ones may need their memory."""

        def growth(pool: PoolPlan) -> int:
            return pool.num_slots - self._of_layer[pool.layers[0]].residency.num_slots

        for pool in sorted(pools, key=growth):
            owner = self._engines.get(pool.layers[0]) or self._of_layer[pool.layers[0]]
            owner.resize(pool.num_slots)

    def clear(self) -> None:
        """Evict every expert."""
        for layer in {id(cache): layer for layer, cache in self._of_layer.items()}.values():
            (self._engines.get(layer) or self._of_layer[layer]).clear()

    def warm(self, counts: Mapping[str, Sequence[float]]) -> None:
        """Load the most used experts into free slots. `counts`: module path of a layer -> uses of each expert.

        Raises `ConfigError` for a layer that there is not, and for counts of more or fewer experts than it has.
        """
        by_name = {layer.name: layer for layer in self._layers}
        for name, uses in counts.items():
            if name not in by_name:
                raise ConfigError(f"the model has no sparse layer {name!r}; its first is {self._layers[0].name!r}")
            if len(uses) != by_name[name].num_experts:
                raise ConfigError(
                    f"{len(uses)} counts for the experts of {name}, which has {by_name[name].num_experts}"
                )
        for cache in self.all():
            layers = [layer for layer in self._layers if self._of_layer[layer.index] is cache]
            wanted = {layer.index: counts[layer.name] for layer in layers if layer.name in counts}
            cache.warm(most_used(wanted, cache.residency.num_slots))

    def all(self) -> list[ExpertCache]:
        """All caches, each once."""
        return list(dict.fromkeys(self._of_layer.values()))

    def load_ahead(self, experts: Iterable[ExpertId]) -> None:
        """Start loads of experts that are certain to be needed next, until one finds no room."""
        for expert in experts:
            cache = self._of_layer.get(expert.layer)
            if cache is None or (cache.is_absent(expert) and not cache.load_ahead(expert)):
                return

    @property
    def follows_cache(self) -> str | None:
        """The strategy that chooses experts by what is resident; None where placement changes no result."""
        return next((held.follows_cache for held in self._experts if held.follows_cache is not None), None)

    def stats(self) -> CacheStats:
        """The statistics of all layers."""
        of_layers = {layer.name: self.stats_of(layer) for layer in self._layers}
        return replace(CacheStats.total(of_layers), follows_cache=self.follows_cache)

    def stats_of(self, layer: SparseLayer) -> LayerStats:
        """The statistics of a layer, including those from before caches were dropped."""
        owner = self._engines.get(layer.index) or self._of_layer.get(layer.index)
        return owner.stats[layer.index] if owner else self._kept_stats.get(layer.index, LayerStats())

    def reset_stats(self) -> None:
        """Start counting from zero."""
        self._kept_stats = {}
        for layer in self._layers:
            self.stats_of(layer)  # collects the counts of a device now, so that they are not added after the reset
        for index, cache in self._of_layer.items():
            cache.stats[index] = LayerStats()

    def record(self, recorder: TraceRecorder | None) -> None:
        """Report every visit from now on to a recorder; None stops reporting."""
        self._recorder = recorder
        self.decoding.is_traced = recorder is not None
        for cache in self.all():
            cache.on_visit = None if recorder is None else recorder.record
