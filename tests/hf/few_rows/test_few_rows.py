"""Modules whose few rows the kernels compute give what they give themselves, and are their own again afterwards."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.hf.few_rows.attention import FewRowsAttention
from transformers_moe_offload.hf.few_rows.linear import FewRowsLinear
from transformers_moe_offload.hf.few_rows.norm import FewRowsNorm, norm_of
from transformers_moe_offload.hf.few_rows.router import FewRowsRouter, route_of
from transformers_moe_offload.hf.few_rows.swap import restore_forwards, use_kernels
from transformers_moe_offload.hf.few_rows.swapped import FewRows
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.kernels import native
from zoo.build import build, zoo_names

from ..conftest import TINY_MOE

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def tensors_of(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", zoo_names())
def test_a_module_gives_what_it_gives_itself(name, dtype):
    model = build(name, dtype).eval()
    use_kernels(model, [path for path, _, _ in find_experts(model)])
    random = torch.Generator().manual_seed(0)
    for module in [
        one for one in model.modules() if isinstance(one, FewRows) and not isinstance(one, FewRowsAttention)
    ]:
        rows = torch.randn(3, module.weight.shape[-1], generator=random).to(module.weight.dtype)
        with torch.no_grad():
            found, expected = module(rows), module.plain_class.forward(module, rows)
        for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.fixture
def model():
    loaded = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="100%"))
    return loaded.eval()


def kinds(model):
    return {
        kind: sum(isinstance(module, kind) for module in model.modules())
        for kind in (FewRowsLinear, FewRowsNorm, FewRowsRouter, FewRowsAttention)
    }


def test_linear_layers_norms_attention_and_routers_of_a_model_are_swapped_and_restored(model):
    assert kinds(model) == {FewRowsLinear: 33, FewRowsNorm: 33, FewRowsRouter: 8, FewRowsAttention: 8}
    classes = [module.plain_class for module in model.modules() if isinstance(module, FewRows)]
    restored = model.moe_offload.restore()
    assert not any(isinstance(module, FewRows) for module in restored.modules())
    assert nn.Linear in classes


def test_exact_arithmetic_keeps_the_models_own_modules():
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(arithmetic="exact"))
    assert sum(kinds(model).values()) == 0


def test_a_hook_on_a_router_has_its_own_forward_run(model, monkeypatch):
    router = next(module for module in model.modules() if isinstance(module, FewRowsRouter))
    ran = []
    monkeypatch.setattr(router.plain_class, "forward", lambda self, hidden: ran.append(hidden) or hidden)
    hidden = torch.randn(1, router.weight.shape[1]).bfloat16()
    with torch.no_grad():
        router(hidden)
        assert not ran
        router.register_forward_hook(lambda *_: None)
        router(hidden)
        assert len(ran) == 1


def test_a_router_whose_numbers_are_changed_computes_itself(model):
    router = next(module for module in model.modules() if isinstance(module, FewRowsRouter))
    router.top_k = 2
    with torch.no_grad():
        assert router(torch.randn(1, router.weight.shape[1]).bfloat16())[2].shape == (1, 2)
    assert not isinstance(router, FewRows)
    model.train().eval()
    assert kinds(model) == {FewRowsLinear: 33, FewRowsNorm: 33, FewRowsRouter: 7, FewRowsAttention: 8}


def test_a_parametrized_layer_stays_parametrized_when_the_model_is_restored(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    path, linear = next((path, one) for path, one in model.named_modules() if isinstance(one, FewRowsLinear))
    rows = torch.randn(1, linear.in_features).bfloat16()
    with torch.no_grad():
        expected = 2 * linear(rows)
        nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
        assert torch.allclose(linear(rows), expected, rtol=2e-2, atol=2e-2)
        restored = model.moe_offload.restore()
        assert torch.allclose(restored.get_submodule(path)(rows), expected, rtol=2e-2, atol=2e-2)


class RouterOfTexts(nn.Module):
    """Keeps texts apart."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, hidden):
        logits = nn.functional.linear(hidden, self.weight)
        scores, index = logits.softmax(-1).topk(2)
        return logits, scores, index


def test_a_router_that_keeps_texts_apart_computes_itself():
    assert route_of(RouterOfTexts()) is None


def test_modes_and_gradients_see_torchs_operations(model):
    from torch.utils.flop_counter import FlopCounterMode

    linear = next(module for module in model.modules() if isinstance(module, FewRowsLinear))
    hidden = torch.randn(1, linear.in_features).bfloat16()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(hidden)
    assert counter.get_total_flops() == 2 * linear.in_features * linear.out_features
    assert linear(hidden).requires_grad


class Odd(nn.Module):
    """Has what a norm has, and computes something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, hidden):
        return self.weight * hidden / (hidden.abs().mean(-1, keepdim=True) + self.eps)


def test_a_module_that_only_looks_like_a_norm_stays_what_it_is():
    assert norm_of(Odd()) is None
    assert norm_of(nn.LayerNorm(16, bias=False)) is None


def test_swapping_twice_is_swapping_once(model):
    before = [type(module) for module in model.modules()]
    use_kernels(model, [layer.name for layer in model.moe_offload.layers])
    assert [type(module) for module in model.modules()] == before
    restore_forwards(model)
    assert sum(kinds(model).values()) == 0
