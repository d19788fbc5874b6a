"""A layer computed by address agrees with the obvious loop: on a GPU, and everywhere else in Triton's interpreter.

Tests marked `gpu` run on a GPU where there is one, and interpreted by `test_interpreted.py`.
"""

# T tokens, K experts per token, E experts, H hidden, I intermediate

import importlib.util
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from compute.records import EXPERTS, GATED, ROUNDING, Records, swiglu
from interpreted import DEVICE, IS_INTERPRETED
from transformers_moe_offload.compute import grouped_resident, token_grouping
from transformers_moe_offload.compute.activation import activate
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.config.formats import HqqFormat
from transformers_moe_offload.device_decode.forward import OnDevice, missing_on_device
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.foreign import ForeignCodec, ForeignField
from transformers_moe_offload.kernels.grouped import Activation
from transformers_moe_offload.store.record import RecordLayout

gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

FORMATS = [
    None,
    *(HqqFormat(nbits=nbits, group_size=16, meta_nbits=16 if nbits == 4 else 8) for nbits in (8, 4, 3, 2, 1)),
]
HALF = [torch.bfloat16, torch.float16]


def test_a_cpu_is_no_device_for_kernels_unless_they_are_interpreted():
    layer = Records(GATED, 2, 16, 16)
    missing = missing_on_device(GATED, layer.layout, layer.codecs, torch.device("cpu"))
    expected = "Triton's kernels do not support cpu" if torch.cuda.is_available() else "torch sees no GPU"
    assert missing is None if IS_INTERPRETED else expected in missing


def on_device(layer, inputs, experts=EXPERTS, module=None, addresses=None):
    compute = OnDevice(layer.mlp, layer.layout, layer.codec, layer.num_experts, module)
    addresses = layer.addresses(DEVICE) if addresses is None else addresses
    return compute(experts, *(tensor.to(DEVICE) for tensor in inputs), addresses)


@gpu
@pytest.mark.parametrize("has_post_expert_norm", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_every_combination_of_flags_computes_its_formula(has_gate, has_bias, is_transposed, has_post_expert_norm):
    mlp = ExpertMlp(has_gate, has_bias, is_transposed, has_post_expert_norm)
    for format, dtype in [(None, torch.float32), (FORMATS[2], torch.float16)]:
        layer = Records(mlp, 3, 16, 32, dtype, format)
        assert missing_on_device(mlp, layer.layout, layer.codecs, DEVICE) is None
        for tokens in (1, 3):
            inputs = layer.inputs(tokens, 2)
            layer.assert_agrees(on_device(layer, inputs), inputs)


@gpu
@settings(deadline=None, max_examples=8 if IS_INTERPRETED else 15)
@given(data=st.data())
def test_any_shape_and_any_routing_is_computed_as_by_the_obvious_loop(data):
    format = data.draw(st.sampled_from(FORMATS))
    dtype = data.draw(st.sampled_from([torch.float32, *HALF]))
    hidden, intermediate = data.draw(st.sampled_from([(16, 48), (80, 16)] if format else [(1, 1), (19, 33), (70, 7)]))
    num_experts, seed = data.draw(st.sampled_from([1, 3, 6, 17])), data.draw(st.integers(0, 99))
    # A row of one number can be next to nothing beside the bias and the product that it is the sum of.
    has_bias = hidden > 1 and data.draw(st.booleans())
    layer = Records(
        ExpertMlp(has_bias=has_bias),
        num_experts,
        hidden,
        intermediate,
        dtype,
        format,
        seed,
    )
    inputs = layer.inputs(data.draw(st.sampled_from([1, 2, 7, 20])), data.draw(st.integers(1, 5)), seed)
    module = EXPERTS if data.draw(st.booleans()) else None
    layer.assert_agrees(on_device(layer, inputs, module=module), inputs)


@gpu
@pytest.mark.parametrize("tokens", [1, 5])
def test_routing_may_be_a_part_of_something_larger(tokens):
    """A column of what a router has sorted, and one weight for all."""
    layer = Records(GATED, 6, 32, 16)
    hidden, index, weights = layer.inputs(tokens, 3)
    inputs = hidden, index[:, :1], weights[:1, :1].expand(tokens, 1)
    layer.assert_agrees(on_device(layer, inputs), inputs)
    inputs = hidden, index, weights[:1, :1].expand(tokens, 3)
    layer.assert_agrees(on_device(layer, inputs), inputs)


CLAMPED = Activation("silu", has_gate=True, is_interleaved=True, limit=0.5, slope=1.702, shift=1.0)
ACTIVATIONS = [
    *itertools.product((CLAMPED, replace(CLAMPED, is_interleaved=False)), FORMATS),
    *((Activation(function, has_gate=True), None) for function in ("gelu", "gelu_tanh", "relu")),
    *((Activation(function), FORMATS[2]) for function in ("silu", "relu2")),
]


@gpu
@pytest.mark.parametrize(("activation", "format"), ACTIVATIONS, ids=str)
def test_activations_of_the_kernels_are_those_of_the_module(activation, format):
    module = module_of(activation)
    layer = Records(ExpertMlp(activation.has_gate, has_bias=True), 3, 16, 32, torch.float32, format)
    for tokens in (1, 4):
        inputs = layer.inputs(tokens, 2)
        layer.assert_agrees(on_device(layer, inputs, never, module), inputs, module)


def never(*args):
    raise AssertionError("the kernels should have done that")


never._apply_gate = never.act_fn = never


def module_of(activation):
    """A module that has its own way to write the activation down."""
    numbers = {"limit": activation.limit or 7.0, "alpha": activation.slope}
    return SimpleNamespace(
        _apply_gate=lambda products: activate(activation, products),
        act_fn=lambda products: activate(activation, products),
        **numbers,
    )


@gpu
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("format", [None, FORMATS[3]], ids=str)
def test_idle_pairs_add_nothing_and_nothing_is_read_for_them(tokens, format):
    layer = Records(ExpertMlp(has_bias=True, has_post_expert_norm=True), 6, 32, 16, torch.float32, format)
    hidden, index, weights = layer.inputs(tokens, 4)
    index[:, 0], weights[:, 0] = 6, torch.inf  # of another rank, whatever its weight
    index[:, 1], weights[:, 1] = 5, 0
    index[:, 2], weights[:, 2] = -1, torch.nan
    index[:, 3], weights[:, 3] = 2, 0.5
    addresses = layer.addresses(DEVICE, wanted={2})  # elsewhere there is nothing to read
    found = on_device(layer, (hidden, index, weights), module=EXPERTS, addresses=addresses)
    layer.assert_agrees(found, (hidden, index, weights))
    no_expert = torch.full_like(index, 6)
    found = on_device(layer, (hidden, no_expert, weights), module=EXPERTS, addresses=torch.zeros_like(addresses))
    assert torch.equal(found.cpu(), torch.zeros_like(hidden))


@gpu
def test_no_tokens_give_no_rows():
    layer = Records(GATED, 3, 16, 16)
    assert on_device(layer, layer.inputs(0, 2)).shape == (0, 16)


@gpu
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_token_may_name_the_same_expert_twice(tokens):
    layer = Records(GATED, 3, 16, 16)
    hidden, index, weights = layer.inputs(tokens, 3)
    index[:, 1] = index[:, 0]
    layer.assert_agrees(on_device(layer, (hidden, index, weights)), (hidden, index, weights))


@gpu
@pytest.mark.parametrize("format", [None, FORMATS[2]], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_where_a_record_lies_makes_no_difference_to_a_bit(tokens, format):
    layer = Records(GATED, 5, 32, 16, torch.bfloat16, format)
    inputs = layer.inputs(tokens, 3)
    arena = layer.addresses(DEVICE)
    expected = on_device(layer, inputs, module=EXPERTS, addresses=arena)
    slots = [torch.empty(layer.layout.nbytes + 64, dtype=torch.uint8, device=DEVICE) for _ in range(5)]
    for resident in ([0], [1, 3], range(5)):
        table = arena.clone()
        for expert in resident:
            slot = slots[expert][-slots[expert].data_ptr() % 64 :][: layer.layout.nbytes]
            slot.copy_(layer.on_device[expert][: layer.layout.nbytes])
            table[expert] = slot.data_ptr()
        assert torch.equal(on_device(layer, inputs, module=EXPERTS, addresses=table), expected)


@gpu
def test_a_prompts_pairs_are_sorted_like_those_of_few_tokens(monkeypatch):
    from transformers_moe_offload.kernels.triton import grouped

    layer = Records(GATED, 5, 16, 16)
    inputs = layer.inputs(9, 3)
    expected = on_device(layer, inputs)
    monkeypatch.setattr(grouped, "MOST_PAIRS", 0)
    assert torch.equal(on_device(layer, inputs), expected)


@gpu
@pytest.mark.parametrize("count", [1, 16, 50, 300])
def test_pairs_are_sorted_by_expert_and_stay_in_order_within_one(count):
    from transformers_moe_offload.kernels.grouped import Pairs
    from transformers_moe_offload.kernels.triton import grouped

    for num_experts in (1, 7, 300):
        random = torch.Generator().manual_seed(count)
        chosen = torch.randint(-1, num_experts + 2, (count,), generator=random)
        weights = torch.randint(0, 3, (count,), generator=random).float()
        addresses = torch.zeros(num_experts, dtype=torch.int64, device=DEVICE)
        found = grouped.ordered(Pairs(count, addresses, 1, chosen.to(DEVICE), weights.to(DEVICE)))
        is_idle = (chosen < 0) | (chosen >= num_experts) | (weights == 0)
        expected = torch.where(is_idle, num_experts, chosen).sort(stable=True)
        assert torch.equal(found.order.cpu(), expected.indices.int())
        bounds = torch.searchsorted(expected.values, torch.arange(num_experts + 1))
        assert torch.equal(found.offsets.cpu().long(), bounds)


@gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_routing_weights_are_used_in_full(tokens):
    layer = Records(GATED, 1, 16, 16, torch.bfloat16)
    hidden, index, _ = layer.inputs(tokens, 2)
    index[:] = 0
    weights = torch.tensor([1.0035, -1.0]).repeat(tokens, 1)  # in bfloat16 they cancel out
    rows = on_device(layer, (hidden, index, torch.tensor([1.0, 0.0]).repeat(tokens, 1))).double()
    found = on_device(layer, (hidden, index, weights)).double()
    torch.testing.assert_close(found, 0.0035 * rows, rtol=2**-7, atol=1e-5)


@gpu
def test_autocast_computes_in_its_dtype_and_returns_what_it_was_given():
    layer = Records(GATED, 3, 32, 16)
    inputs = layer.inputs(2, 2)
    plain = on_device(layer, inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = on_device(layer, inputs)
    layer.assert_agrees(found, inputs, rounding=ROUNDING[torch.bfloat16])
    assert not torch.equal(found, plain)


class NoSync(TorchDispatchMode):
    """A call that makes the host wait for the device fails, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "bincount", "unique", "is_nonzero"))
        out = func(*args, **(kwargs or {}))
        devices = {tensor.device for tensor in (*args, out) if isinstance(tensor, torch.Tensor)}
        assert len(devices) <= 1, f"{name} goes from one device to another"
        return out


@gpu
@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_nothing_is_read_on_the_host(tokens, is_prompt, monkeypatch):
    from transformers_moe_offload.kernels.triton import grouped

    if is_prompt:
        monkeypatch.setattr(grouped, "MOST_PAIRS", 0)
    layer = Records(ExpertMlp(has_bias=True), 3, 16, 16)
    inputs = [tensor.to(DEVICE) for tensor in layer.inputs(tokens, 2)]
    compute = OnDevice(layer.mlp, layer.layout, layer.codec, layer.num_experts)
    addresses = layer.addresses(DEVICE)
    expected = compute(EXPERTS, *inputs, addresses)
    with NoSync():
        assert compute(EXPERTS, *inputs, addresses).shape == expected.shape
        with pytest.raises(AssertionError):
            inputs[1].nonzero()


@gpu
@pytest.mark.parametrize("format", [None, FORMATS[2]], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("few_pairs", [0, 64])
def test_held_experts_have_the_bits_together_that_they_have_alone(tokens, few_pairs, format, monkeypatch):
    monkeypatch.setattr(token_grouping, "FEW_PAIRS", few_pairs)
    for mlp in (GATED, ExpertMlp(False, has_bias=True, is_transposed=True)):
        layer = Records(mlp, 4, 32, 16, torch.bfloat16, format)
        hidden, index, weights = (tensor.to(DEVICE) for tensor in layer.inputs(tokens, 3))
        grouping = group_by_expert(index, weights, 4)
        layer.records = layer.records.to(DEVICE)

        def rows_of(experts, inputs=(mlp, EXPERTS, hidden, grouping), layer=layer):
            return grouped_resident.together(*inputs, layer.held(experts), layer.codecs)

        found = rows_of(grouping.experts)
        for expert in grouping.experts:
            assert torch.equal(rows_of([expert])[expert], found[expert])
        for pair in itertools.pairwise(grouping.experts):
            assert torch.equal(rows_of(pair[::-1])[pair[0]], found[pair[0]])
        for expert, rows in found.items():
            wanted = hidden.cpu()[grouping.tokens[expert]].double()
            expected = mlp(EXPERTS, wanted, layer.weights[expert])
            tolerance = ROUNDING[torch.bfloat16] * expected.abs().amax(-1, keepdim=True)
            assert (rows.cpu().double() - expected).abs().le(tolerance).all()


@gpu
def test_what_cannot_be_computed_by_address_is_said():
    layer = Records(GATED, 2, 16, 16, format=FORMATS[1])
    assert missing_on_device(GATED, layer.layout, LayerCodecs(layer.codec), DEVICE) is None
    some_hot = LayerCodecs(layer.codec, None, frozenset({1}))
    assert "another format" in missing_on_device(GATED, layer.layout, some_hot, DEVICE)
    spec = FieldSpec("down_proj", (16, 16), "float32")
    foreign = LayerCodecs(ForeignCodec((ForeignField(spec, (spec,)),)))
    assert "no kernels" in missing_on_device(GATED, layer.layout, foreign, DEVICE)
    doubles = Records(GATED, 2, 16, 16, torch.float64)
    assert "float64" in missing_on_device(GATED, doubles.layout, doubles.codecs, DEVICE)
    more = RecordLayout([*Records(GATED, 2, 16, 16).layout.fields, FieldSpec("scale", (16,), "float32")])
    assert "scale" in missing_on_device(GATED, more, LayerCodecs(), DEVICE)
    assert swiglu(torch.ones(1, 2)).shape == (1, 1)
