"""Turn offloaded experts into parameters of the model, so that they can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from transformers_moe_offload.errors import CapacityError, ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.model.handle import OffloadRuntime
from transformers_moe_offload.hf.model.own_experts import NAME, own_experts
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer


def make_own(runtime: OffloadRuntime, wanted: Mapping[str, Iterable[int]]) -> list[str]:
    """Turn experts, given by their module's path, into parameters of the model; returns the parameters' names.

    Their bytes are subtracted from the cache's budget. Raises, before changing anything, if the budget is too small.
    """
    modules = {layer.name: (module, layer) for module, layer in runtime.modules()}
    new = {name: [e for e in experts if e not in own_experts(modules[name][0])] for name, experts in wanted.items()}
    for name, experts in new.items():
        _check(runtime, modules[name][1], experts)
    nbytes = sum(runtime.spec(modules[name][1]).expert_nbytes * len(experts) for name, experts in new.items())
    _reserve(runtime, nbytes)
    names = []
    for name, experts in new.items():
        module, layer = modules[name]
        if experts and NAME not in module._modules:
            module.add_module(NAME, nn.Module())
        for expert in experts:
            fields = _read(runtime, layer, expert)
            module.get_submodule(NAME).add_module(str(expert), fields)
    for name, all_of_them in wanted.items():
        for expert in all_of_them:
            own = modules[name][0].get_submodule(f"{NAME}.{expert}")
            names += [f"{name}.{NAME}.{expert}.{field}" for field in own._parameters]
    return names


def _check(runtime: OffloadRuntime, layer: SparseLayer, experts: Iterable[int]) -> None:
    if any("." in field.name or not field.is_stacked for field in layer.fields):
        raise UnsupportedModelError(
            f"single experts of {layer.name} cannot be trained: they are not stacked in parameters of the module "
            f"itself; restore() the model to train all of them"
        )
    if any(codec is not None for codec in runtime.source(layer).codecs.kinds):
        raise ConfigError(
            f"the experts of {layer.name} are quantized and constant; load the model without experts= to train some "
            f"of them, or train LoRA on them"
        )
    for expert in experts:
        if not 0 <= expert < layer.num_experts:
            raise ConfigError(f"{layer.name} has no expert {expert}; it has 0 to {layer.num_experts - 1}")


def _reserve(runtime: OffloadRuntime, nbytes: int) -> None:
    budget, smallest = runtime.plan.budget_bytes, runtime.plan.smallest_budget
    if not nbytes:
        return
    if budget - nbytes < smallest:
        raise CapacityError(
            f"the chosen experts need {nbytes:,} bytes and the others at least {smallest:,}, but the budget is "
            f"{budget:,}; set OffloadConfig.cache_budget to {nbytes + smallest:,} or more, or choose fewer experts",
            smallest_budget=nbytes + smallest,
        )
    runtime.resize(budget - nbytes)


def _read(runtime: OffloadRuntime, layer: SparseLayer, expert: int) -> nn.Module:
    fields = nn.Module()
    for name, tensor in runtime.source(layer).read(expert).items():
        fields.register_parameter(name, nn.Parameter(tensor.to(layer.device, copy=True)))
    return fields
