"""Experts classes of Transformers, computed by their records' addresses, against their own eager forward.

Tests marked `gpu` run on a GPU where there is one, and interpreted by `test_interpreted.py`.
"""

# T tokens, K experts per token, E experts, H hidden

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from interpreted import DEVICE
from transformers_moe_offload.compute.activation import activate, recognised
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.device_decode.forward import OnDevice, missing_on_device
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import AS_USED
from transformers_moe_offload.hf.layouts.stacked import StackedLayout
from transformers_moe_offload.store.record import RecordLayout
from zoo.build import build

gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

RECOGNISED = {
    "aria": "silu",  # transposed
    "beam": "silu",  # gates in float32
    "deepseek_v4": "silu",  # clamped
    "gemma4": "gelu_tanh",
    "gpt_oss": "silu",  # clamped, interleaved, transposed, with biases
    "inkling2": None,  # an activation of two arguments
    "minimax_m3_vl": "silu",  # as gpt_oss, side by side
    "muse_spark": "silu",  # normalised after each expert
    "nemotron_h": "relu2",  # without a gate
    "qwen3_moe": "silu",
}
"""One architecture for each way in which experts differ, and the activation that the kernels do for it."""


@gpu
@pytest.mark.parametrize("name", RECOGNISED)
def test_experts_of_transformers_compute_by_address_what_they_compute_themselves(name):
    module = next(module for module in build(name).modules() if StackedLayout.matches(module))
    layout = StackedLayout()
    mlp, fields, num_experts = layout.mlp(module), layout.fields(module), layout.num_experts(module)
    found = recognised(mlp, module)
    assert (found and found.function) == RECOGNISED[name]
    stacks = {field.name: getattr(module, field.name).detach() for field in fields}
    record = RecordLayout([FieldSpec(field.name, field.shape, dtype_name(field.dtype)) for field in fields])
    assert missing_on_device(mlp, record, AS_USED, DEVICE) is None
    records = torch.zeros(num_experts, record.row_bytes, dtype=torch.uint8)
    for expert in range(num_experts):
        for field, view in record.views(records[expert]).items():
            view.copy_(stacks[field][expert])
    records, module = records.to(DEVICE), module.to(DEVICE)
    addresses = torch.tensor([one.data_ptr() for one in records], device=DEVICE)
    hidden_size = next(field.shape for field in fields if field.name == "down_proj")[mlp.is_transposed]
    random = torch.Generator().manual_seed(0)
    compute = OnDevice(mlp, record, None, num_experts, module)
    for tokens, choices in ((1, 1), (3, 2)):
        hidden = torch.randn(tokens, hidden_size, generator=random)
        weights, index = torch.rand(tokens, num_experts, generator=random).softmax(-1).topk(choices)
        inputs = [tensor.to(DEVICE) for tensor in (hidden, index, weights)]
        with torch.no_grad():
            expected = layout.eager_forward(module)(module, *inputs)
            torch.testing.assert_close(compute(module, *inputs, addresses), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_quite_an_activation_of_the_kernels_is_not_taken_for_one():
    mlp = ExpertMlp()
    gates = {
        "another limit for ups": lambda gate, up: clamped_silu(gate, 7.0) * up.clamp(-6.0, 6.0),
        "ups clamped on one side": lambda gate, up: clamped_silu(gate, 7.0) * up.clamp(max=7.0),
        "a limit far out": lambda gate, up: torch.nn.functional.silu(gate).clamp(max=5000.0) * up,
        "gates and ups changed over": lambda gate, up: gate * torch.nn.functional.silu(up),
        "another slope": lambda gate, up: gate * torch.sigmoid(1.7 * gate) * up,
        "a little more": lambda gate, up: torch.nn.functional.silu(gate) * (up + 1e-3),
    }
    for kind, gate in gates.items():
        module = SimpleNamespace(_apply_gate=lambda products, gate=gate: gate(*products.chunk(2, -1)), limit=7.0)
        assert recognised(mlp, module) is None, kind
    module = SimpleNamespace(_apply_gate=lambda products: clamped_silu(products.chunk(2, -1)[0], 7.0), limit=7.0)
    assert recognised(mlp, module) is None, "no ups at all"


def test_an_activation_that_needs_its_device_is_left_to_the_module():
    module = SimpleNamespace(_apply_gate=lambda products: products + torch.ones(1, device="meta"))
    assert recognised(ExpertMlp(), module) is None


def test_recognised_activations_are_the_modules_for_any_products():
    module = next(module for module in build("gpt_oss").modules() if StackedLayout.matches(module))
    products = 10 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    found = recognised(StackedLayout().mlp(module), module)
    torch.testing.assert_close(activate(found, products), module._apply_gate(products))


def clamped_silu(gate, limit):
    return torch.nn.functional.silu(gate.clamp(max=limit))
