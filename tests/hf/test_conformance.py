"""Every Mixture-of-Experts architecture of the installed Transformers, offloaded, against itself.

The list is enumerated from the installed package (`zoo/inventory.py`), so an architecture that is new upstream fails
here by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from transformers_moe_offload import CapacityError, OffloadConfig
from transformers_moe_offload.hf.layer import OffloadedExperts, layer_of
from zoo.build import LAYOUTS, build, inputs, output_tensor, save, zoo_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

EQUAL_TO_ROUNDING = {"llama4": 1e-5}
"""Its stock forward multiplies every expert with every token, so sums are taken over other numbers of rows."""

EAGER_FORWARD_IS_KEPT = {
    "dbrx": "not the decorator's layout",
    "jetmoe": "not the decorator's layout",
    "llama4": "not the decorator's layout",
    "longcat_flash": "identity experts",
    "nllb_moe": "experts are modules",
    "openai_privacy_filter": "computes bf16 in fp32",
    "switch_transformers": "experts are modules",
}


@pytest.fixture(params=zoo_names())
def name(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offloaded_logits_equal_eager_ones_at_every_cache_size(name, dtype, layout, tmp_path):
    plain = build(name, dtype)
    save(plain, tmp_path, layout)
    expected = forward(name, plain)
    for budget in (smallest_budget(plain, tmp_path), "50%", "100%"):
        config = OffloadConfig(cache_budget=budget, arithmetic="exact")
        model, report = type(plain).from_pretrained(tmp_path, dtype=dtype, moe_offload=config, output_loading_info=True)
        assert not any(report.values()), report
        got = forward(name, model)
        if name in EQUAL_TO_ROUNDING and dtype == torch.float32:
            torch.testing.assert_close(got, expected, atol=EQUAL_TO_ROUNDING[name], rtol=0)
        else:
            assert torch.equal(got, expected), f"{budget}: off by {(got - expected).abs().max()}"
        stats = model.moe_offload.stats()
        assert stats.misses > 0
        assert model.moe_offload.plan.cache_bytes <= model.moe_offload.plan.budget_bytes
        assert all(layer.asked > 0 for layer in stats.per_layer.values()), "a sparse layer was not offloaded"


def test_fast_arithmetic_is_placement_invariant_and_as_close_to_exact_as_eager(name, dtype, tmp_path):
    plain = build(name, dtype)
    save(plain, tmp_path, "fused")
    smallest = type(plain).from_pretrained(
        tmp_path, dtype=dtype, moe_offload=OffloadConfig(cache_budget=smallest_budget(plain, tmp_path))
    )
    whole = type(plain).from_pretrained(tmp_path, dtype=dtype, moe_offload=OffloadConfig(cache_budget="100%"))
    first = forward(name, whole)
    assert torch.equal(first, forward(name, smallest))
    assert torch.equal(first, forward(name, whole)), "differs once everything is resident"

    with recorded_calls(whole) as calls:
        forward(name, whole)
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
    return output_tensor(model(**inputs(name, model)))


def smallest_budget(plain: nn.Module, folder) -> int:
    with pytest.raises(CapacityError) as refused:
        type(plain).from_pretrained(folder, dtype=plain.dtype, moe_offload=OffloadConfig(cache_budget=1))
    return refused.value.smallest_budget


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
