"""Every Mixture-of-Experts architecture of the installed Transformers, offloaded, against itself.

The list is enumerated from the installed package (`zoo/inventory.py`), so an architecture that is new upstream fails
here by name. One that fails in Transformers itself, for which there is no list either, has to fail offloaded as well,
and in the same way.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from zoo.build import build, failure_of_stock, inputs, load, output_tensor, save, zoo_names

AS_STORED = {"fp32": (torch.float32, "fused"), "bf16": (torch.bfloat16, "per-expert")}
"""Each dtype with one layout: what depends on both at once is how experts are read, which tests/store is about."""

FAST = [(name, torch.bfloat16) for name in zoo_names()] + [(name, torch.float32) for name in zoo_names()[::4]]
"""Kernels know dtypes and no architectures: float32 is tried with some."""

EQUAL_TO_ROUNDING = {"llama4": 1e-5, "llama4_text": 1e-5}
"""Its stock forward multiplies every expert with every token, so sums are taken over other numbers of rows."""

EAGER_FORWARD_IS_KEPT = {
    "dbrx": "not the decorator's layout",
    "jetmoe": "not the decorator's layout",
    "llama4": "not the decorator's layout",
    "llama4_text": "not the decorator's layout",
    "longcat_flash": "identity experts",
    "nllb_moe": "experts are modules",
    "openai_privacy_filter": "computes bf16 in fp32",
    "switch_transformers": "experts are modules",
}


@pytest.mark.parametrize("name", zoo_names())
@pytest.mark.parametrize("stored", AS_STORED)
def test_offloaded_logits_equal_eager_ones_in_the_largest_and_the_smallest_cache(name, stored, tmp_path):
    dtype, layout = AS_STORED[stored]
    plain = build(name, dtype)
    save(plain, tmp_path, layout)
    config = OffloadConfig(cache_budget="100%", arithmetic="exact")
    model, report = load(plain, tmp_path, dtype=dtype, moe_offload=config, output_loading_info=True)
    assert not any(report.values()), report
    if failure_of_stock(name) is not None:
        with pytest.raises(type(failure_of_stock(name)), match=re.escape(str(failure_of_stock(name)))):
            forward(name, model)
        return
    expected = forward(name, plain)
    for budget in (model.moe_offload.plan.budget_bytes, model.moe_offload.plan.smallest_budget):
        model.moe_offload.resize(budget)
        model.moe_offload.reset_stats()
        got = forward(name, model)
        if name in EQUAL_TO_ROUNDING and dtype == torch.float32:
            torch.testing.assert_close(got, expected, atol=EQUAL_TO_ROUNDING[name], rtol=0)
        else:
            assert torch.equal(got, expected), f"{budget} bytes: off by {(got - expected).abs().max()}"
        stats, plan = model.moe_offload.stats(), model.moe_offload.plan
        assert stats.misses > 0
        assert plan.cache_bytes <= plan.budget_bytes == budget
        assert all(layer.asked > 0 for layer in stats.per_layer.values()), "a sparse layer was not offloaded"


@pytest.mark.parametrize(("name", "dtype"), FAST)
def test_fast_arithmetic_is_placement_invariant_and_as_close_to_exact_as_eager(name, dtype, tmp_path):
    if failure_of_stock(name) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(name)!r}")
    plain = build(name, dtype)
    save(plain, tmp_path, "fused")
    model = load(plain, tmp_path, dtype=dtype, moe_offload=OffloadConfig(cache_budget="100%"))
    first = forward(name, model)
    with recorded_calls(model) as calls:
        assert torch.equal(first, forward(name, model)), "differs once everything is resident"
    model.moe_offload.resize(model.moe_offload.plan.smallest_budget)
    assert torch.equal(first, forward(name, model)), "differs in the smallest cache"

    double = build(name, torch.float64)
    double.load_state_dict(plain.state_dict())
    assert bool(calls) == (name not in EAGER_FORWARD_IS_KEPT)
    for path, (args, got) in calls.items():
        exact = call(double, path, [as_double(arg) for arg in args])
        eager_error = (call(plain, path, args).double() - exact).abs().mean()
        our_error = (got.double() - exact).abs().mean()
        smallest_step = torch.finfo(dtype).eps * exact.abs().mean()
        assert our_error <= 1.1 * eager_error + smallest_step / 8, path


@torch.no_grad()
def forward(name: str, model: nn.Module) -> torch.Tensor:
    """The output; the weights that are in memory lie at addresses of ours.

    Stock Transformers leaves them where the file has them, and some processors' products sum in another order off a
    cache line: a plain model that was loaded need not equal its own copy to the bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return output_tensor(model(**inputs(name, model)))


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[dict]:
    """The arguments and result of every experts module's last call, by the module's path."""
    calls: dict = {}
    modules = {path: m for path, m in model.named_modules() if isinstance(m, OffloadedExperts) and layer_of(m).mlp}
    hooks = [
        module.register_forward_hook(lambda _, args, out, path=path: calls.__setitem__(path, (args, out)))
        for path, module in modules.items()
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def as_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def call(model: nn.Module, path: str, args) -> torch.Tensor:
    """One experts module of a plain model, through its own eager forward."""
    return model.get_submodule(path)(*args)
