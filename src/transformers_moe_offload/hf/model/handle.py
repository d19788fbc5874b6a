"""`model.moe_offload`: the handle of an offloaded model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.errors import ConfigError, MoeOffloadError
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.cuda_graphs.step import DecodeSteps
from transformers_moe_offload.hf.decode.decoding import Decoding
from transformers_moe_offload.hf.few_rows.swap import restore_forwards
from transformers_moe_offload.hf.loading.placeholders import put_back
from transformers_moe_offload.hf.model.caches import LayerCaches
from transformers_moe_offload.hf.model.dense import restore_dense
from transformers_moe_offload.hf.model.experts_module import OffloadedLayer, experts_at, offloaded, unbind
from transformers_moe_offload.hf.model.forward_hooks import announcing
from transformers_moe_offload.hf.model.layer_forward import LayerForward
from transformers_moe_offload.hf.model.module_paths import expect_in_place
from transformers_moe_offload.hf.model.own_experts import NAME as OWN_EXPERTS
from transformers_moe_offload.hf.model.own_experts import put_among_the_others
from transformers_moe_offload.hf.model.parameters import parameters_of
from transformers_moe_offload.hf.model.plan import OffloadPlan
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.model.state_dicts import remove_state_dict_hooks
from transformers_moe_offload.hf.upstream import COMPILED_CALL, tied_weights
from transformers_moe_offload.stats import CacheStats
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.tracing import Trace, TraceRecorder


class OffloadRuntime:
    """Statistics, plan and life cycle of a model's offloaded experts.

    Caches are built while the model is loaded, and again at the next forward after layers have moved to another device
    or dtype. Copies of a model share the files but have caches of their own.
    """

    def __init__(self, model: nn.Module, config: OffloadConfig, layers: Sequence[SparseLayer]) -> None:
        self.config = config
        self._model = weakref.ref(model)
        self._experts = [offloaded(experts_at(model, layer.name)) for layer in layers]
        self._sources: dict[int, LayerSource] = {}
        self._caches = LayerCaches(self._experts)
        self._recorder: TraceRecorder | None = None
        self._steps = DecodeSteps(self._living_model, self._decoding)
        self._is_closed = False
        for experts, layer in zip(self._experts, layers, strict=True):
            experts.layer, experts.handle = layer, self

    # Called by users.

    def stats(self) -> CacheStats:
        """Counts since loading or the last `reset_stats`, in total and by layer."""
        return CacheStats.total({layer.name: self._caches.stats_of(layer) for layer in self.layers})

    def reset_stats(self) -> None:
        """Start counting from zero; resident experts stay."""
        self._caches.reset_stats()

    @property
    def plan(self) -> OffloadPlan:
        """Where experts are stored and how many slots there are; prints as a table."""
        return self._ensure_caches()

    def resize(self, cache_budget: int | str) -> None:
        """Give the cache another budget, also while a generation runs; experts that fit stay resident.

        A budget that does not work raises `CapacityError` or `ConfigError` and changes nothing.
        """
        with self._caches.resizing:
            config = OffloadConfig.from_dict(self.config.to_dict() | {"cache_budget": cache_budget})
            self._check_open()
            self._caches.resize(self._sources, config)
            self.config = config

    def warm(self, histogram: Trace | Mapping[str, Sequence[float]]) -> None:
        """Load the most used experts into free slots, and wait for them.

        `histogram` is a `Trace`, or maps the module path of a sparse layer to the number of uses of each expert.
        """
        counts = histogram.counts() if isinstance(histogram, Trace) else histogram
        self._ensure_caches()
        by_name = {layer.name: layer for layer in self.layers}
        for name, uses in counts.items():
            if name not in by_name:
                raise ConfigError(f"the model has no sparse layer {name!r}; its first is {self.layers[0].name!r}")
            if len(uses) != by_name[name].num_experts:
                raise ConfigError(
                    f"{len(uses)} counts for the experts of {name}, which has {by_name[name].num_experts}"
                )
        self._caches.warm(counts)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record, inside a `with` block, which experts each sparse layer visits; one generation at a time."""
        if self._recorder is not None:
            raise MoeOffloadError("this model is being traced already; leave the first `with` block first")
        names = [layer.name for layer in self.layers]
        num_experts = [layer.num_experts for layer in self.layers]
        self._ensure_caches()
        recorder = TraceRecorder(names, num_experts, stall_ms=lambda: self.stats().stall_ms)
        hooks: list[Any] = []
        try:
            self._recorder = recorder
            self._caches.record(recorder)
            hooks += announcing(self._living_model(), recorder)
            yield recorder.trace
        finally:
            self._recorder = None
            self._caches.record(None)
            for hook in hooks:
                hook.remove()
            recorder.finish_visit()

    def restore(self) -> Any:
        """Read all experts into ordinary parameters, decode quantized weights, and return the plain model.

        Afterwards the model contains nothing of this package. Needs memory for the whole model.
        """
        model = self._living_model()
        loaded = [(module, layer, self._parameters(module, layer)) for module, layer in self.modules()]
        for module, layer, tensors in loaded:
            module._modules.pop(OWN_EXPERTS, None)
            unbind(module)
            put_back(module, layer.parameter_order, tensors)
        restore_dense(model)
        restore_forwards(model)
        del model.moe_offload
        remove_state_dict_hooks(model)
        vars(model).pop("hf_quantizer", None)
        vars(model).pop(COMPILED_CALL, None)
        self.close()
        return model

    def close(self) -> None:
        """Free slots, threads and files now. The model cannot run afterwards."""
        self._steps.forget()
        self._caches.drop(keep_stats=False)
        self._sources.clear()
        self._is_closed = True

    # Called by the rest of `hf`.

    @property
    def layers(self) -> tuple[SparseLayer, ...]:
        """The sparse layers, in the order of the model."""
        return tuple(experts.layer for experts in self._experts)

    @property
    def is_quantized(self) -> bool:
        """Whether there are weights in a format of ours."""
        return any(one is not None for one in (self.config.experts, self.config.dense, self.config.lm_head))

    @property
    def model(self) -> Any:
        """The model that this handle belongs to."""
        return self._living_model()

    def _decoding(self) -> Decoding:
        return self.decoding

    @property
    def decoding(self) -> Decoding:
        """The layers that decode on the device."""
        self._ensure_caches()
        return self._caches.decoding

    def modules(self) -> Iterator[tuple[nn.Module, SparseLayer]]:
        """The experts modules of the model, each with its layer.

        Raises `UnsupportedModelError` if they are not where they were when the model was loaded.
        """
        model = self._living_model()
        self.expect_in_place()
        for layer in self.layers:
            yield experts_at(model, layer.name), layer

    def attach(self, sources: Sequence[LayerSource]) -> None:
        """Set the sources of the experts, and build caches; raises `CapacityError` if the budget is too small."""
        self._sources = {source.spec.layer: source for source in sources}
        self._ensure_caches()
        if self.config.decode == "graph":
            vars(self.model)[COMPILED_CALL] = self._steps.get_compiled_call

    def spec(self, layer: SparseLayer) -> ExpertSpec:
        """The fields of a layer's experts, in the current dtype."""
        return self.source(layer).spec

    def source(self, layer: SparseLayer) -> LayerSource:
        """The current source of a layer's experts."""
        self._check_open()
        return self._sources[layer.index]

    def prepare(self, experts: OffloadedLayer, device: torch.device) -> LayerForward:
        """What computes a layer whose inputs are on a device; caches are built if there are none."""
        if device != experts.layer.device:
            experts.layer = replace(experts.layer, device=device)
            self._caches.drop(keep_stats=True)
        self._ensure_caches()
        assert experts.current is not None
        return experts.current

    def moved(self, experts: OffloadedLayer, fn: Callable[[Tensor], Tensor]) -> None:
        """Let a layer follow `nn.Module.to` or a similar method, which applies `fn` to every parameter."""
        layer, source = experts.layer, self.source(experts.layer)
        dtype = source.spec.fields[0].dtype
        probe = fn(torch.empty(0, dtype=torch_dtype(dtype), device=layer.device))
        if probe.device.type == "meta" or (probe.device == layer.device and dtype_name(probe.dtype) == dtype):
            return
        experts.layer = replace(layer, device=probe.device)
        self._sources[layer.index] = source.cast(dtype_name(probe.dtype))
        self._caches.drop(keep_stats=True)

    def expect_in_place(self) -> None:
        """Raise `UnsupportedModelError` if experts modules are not where they were when the model was loaded."""
        expect_in_place(self._living_model(), self._experts)

    def state_dict(self, without: Container[str] = ()) -> dict[str, Tensor]:
        """All experts under their names in the plain model's `state_dict`; tied ones share memory.

        A layer is not read if `without` contains all of its names.
        """
        tied = tied_weights(self._living_model())
        tensors: dict[str, Tensor] = {}
        for module, layer in self.modules():
            if all(f"{layer.name}.{path}" in without for field in layer.fields for path in field.paths):
                continue
            for path, tensor in self._parameters(module, layer).items():
                name = f"{layer.name}.{path}"
                tensors[name] = tensors.setdefault(tied.get(name, name), tensor)
        return tensors

    def _parameters(self, module: nn.Module, layer: SparseLayer) -> dict[str, Tensor]:
        """All experts of a layer, including own experts: path in the module -> tensor."""
        tensors = parameters_of(layer, self.source(layer))
        put_among_the_others(module, layer.fields, tensors)
        return tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadRuntime:
        old_model = self._living_model()
        copied = object.__new__(OffloadRuntime)
        memo[id(self)] = copied
        copied.config = self.config
        copied._model = weakref.ref(memo.get(id(old_model), old_model))
        copied._sources = dict(self._sources)
        copied._recorder = None
        copied._is_closed = self._is_closed
        copied._steps = deepcopy(self._steps, memo)
        copied._experts = deepcopy(self._experts, memo)
        copied._caches = LayerCaches(copied._experts)
        return copied

    def __repr__(self) -> str:
        return f"OffloadRuntime({self.config!r})\n{self.plan}"

    def _check_open(self) -> None:
        if self._is_closed:
            raise MoeOffloadError("this model's offloading was closed; load the model again to use it")

    def _ensure_caches(self) -> OffloadPlan:
        self._check_open()
        return self._caches.plan or self._caches.build(self._living_model(), self._sources, self.config)

    def _living_model(self) -> Any:
        model = self._model()
        if model is None:
            raise MoeOffloadError(
                "the model was garbage-collected, and its experts cannot be computed without it; keep a reference to "
                "all of it, as in `model = ...from_pretrained(...)`, also if only a part of it or this handle is used"
            )
        return model


def cache_stats(model: Any) -> CacheStats:
    """`model.moe_offload.stats()`, also for a model wrapped by PEFT."""
    return runtime_of(model).stats()


def restore(model: Any) -> Any:
    """`model.moe_offload.restore()`: the plain model, with all experts in memory."""
    return runtime_of(model).restore()


def runtime_of(model: Any) -> OffloadRuntime:
    """The handle of an offloaded model."""
    runtime = getattr(model, "moe_offload", None)
    if not isinstance(runtime, OffloadRuntime):
        raise MoeOffloadError(f"{type(model).__name__} is not offloaded; load it with moe_offload=OffloadConfig(...)")
    return runtime
