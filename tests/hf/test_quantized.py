"""Experts and dense layers in low bits, against plain models that hold the same weights decoded."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ConfigError, ExpertFormats, HqqFormat, OffloadConfig, kernels
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.system import free_memory
from zoo.build import build, inputs, output_tensor, save

KINDS = {
    "qwen3_moe": "gate and up projection in one",
    "mixtral": "the same, saved under other names",
    "gpt_oss": "transposed, interleaved, with biases and a clamp",
    "openai_privacy_filter": "transposed, with biases, computed in float32",
    "aria": "transposed",
    "nemotron_h": "no gate",
    "muse_spark": "a norm after each expert",
    "deepseek_v3": "shared experts",
    "llama4_text": "every expert is multiplied with every token",
    "dbrx": "rows of all experts in one matrix",
    "jetmoe": "experts in the attention, too",
    "switch_transformers": "experts are modules",
    "longcat_flash": "identity experts",
}
SMALL_GROUPS = {"group_size": 16}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def load(folder, plain, **options):
    return type(plain).from_pretrained(folder, dtype=plain.dtype, moe_offload=OffloadConfig(**options))


@torch.no_grad()
def forward(name: str, model: nn.Module) -> torch.Tensor:
    return output_tensor(model(**inputs(name, model)))


def decoded(plain: nn.Module, quantized: nn.Module) -> nn.Module:
    """A plain model with the weights that a quantized one stands for."""
    twin = deepcopy(plain)
    twin.load_state_dict(quantized.moe_offload.restore().state_dict())
    return twin


def test_exact_arithmetic_equals_a_plain_model_that_holds_the_decoded_weights(name, tmp_path):
    plain = build(name, torch.bfloat16)
    save(plain, tmp_path, "fused")
    options = {"experts": HqqFormat(nbits=4, **SMALL_GROUPS), "arithmetic": "exact"}
    expected = forward(name, decoded(plain, load(tmp_path, plain, **options)))
    assert not torch.equal(expected, forward(name, plain)), "nothing was quantized"
    for budget in ("30%", "100%"):
        assert torch.equal(forward(name, load(tmp_path, plain, cache_budget=budget, **options)), expected)


def test_fast_arithmetic_is_as_close_to_the_decoded_weights_as_a_plain_model(name, tmp_path):
    plain = build(name, torch.bfloat16)
    save(plain, tmp_path, "fused")
    model = load(tmp_path, plain, experts=HqqFormat(nbits=8, **SMALL_GROUPS))
    got = forward(name, model)
    plain_twin = decoded(plain, model)
    exact = forward(name, plain_twin.double())
    error = (got.double() - exact).abs().mean()
    rounding = (forward(name, plain_twin.to(torch.bfloat16)).double() - exact).abs().mean()
    assert error <= 1.5 * rounding + 1e-6


@pytest.mark.parametrize("meta_nbits", [16, 8])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("arithmetic", ["fast", "exact"])
def test_results_do_not_depend_on_where_quantized_experts_are(
    nbits, meta_nbits, arithmetic, checkpoint, plain, token_ids
):
    format = HqqFormat(nbits=nbits, meta_nbits=meta_nbits, **SMALL_GROUPS)
    seen = []
    for placement in ({"mmap": False, "cache_budget": "20%"}, {"mmap": False, "cache_budget": "100%"}, {"mmap": True}):
        model = load(checkpoint, plain, experts=format, arithmetic=arithmetic, **placement)
        with torch.no_grad():
            seen += [model(input_ids=token_ids).logits, model(input_ids=token_ids).logits]
    assert all(torch.equal(logits, seen[0]) for logits in seen)


def test_fewer_bits_are_further_from_the_original_and_take_less_memory(checkpoint, plain, token_ids, expected):
    errors, sizes = [], []
    for nbits in (8, 4, 3, 2, 1):
        model = load(checkpoint, plain, experts=HqqFormat(nbits=nbits, **SMALL_GROUPS))
        with torch.no_grad():
            errors.append(float((model(input_ids=token_ids).logits - expected).abs().mean()))
        sizes.append(model.moe_offload.plan.expert_bytes)
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


def test_layers_may_have_different_formats(checkpoint, plain, token_ids, expected):
    formats = ExpertFormats(
        default=HqqFormat(nbits=2, **SMALL_GROUPS), layers={"0": None, "1-2": {"nbits": 8, **SMALL_GROUPS}}
    )
    mixed = load(checkpoint, plain, experts=formats)
    restored = mixed.moe_offload.restore()
    layers = [(old, new) for old, new in zip(plain.model.layers, restored.model.layers, strict=True)]
    errors = [float((old.mlp.experts.down_proj - new.mlp.experts.down_proj).norm()) for old, new in layers]
    assert errors[0] == 0
    assert 0 < errors[1] < errors[3] / 10


def test_generation_gives_the_tokens_of_the_decoded_model(checkpoint, plain, token_ids):
    model = load(checkpoint, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS), arithmetic="exact", cache_budget="25%")
    twin = decoded(plain, load(checkpoint, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS)))
    for mode in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(0)
        got = model.generate(input_ids=token_ids, max_new_tokens=8, **mode)
        torch.manual_seed(0)
        assert torch.equal(got, twin.generate(input_ids=token_ids, max_new_tokens=8, **mode)), mode


def test_gradients_are_those_of_the_decoded_model(checkpoint, plain, token_ids):
    model = load(checkpoint, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS), arithmetic="exact", cache_budget="25%")
    twin = decoded(plain, load(checkpoint, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS)))
    for one in (model, twin):
        one(input_ids=token_ids, labels=token_ids).loss.backward()
    ours = dict(model.named_parameters())
    for path, parameter in twin.named_parameters():
        if "experts" not in path:
            assert torch.equal(ours[path].grad, parameter.grad), path


def test_a_model_in_another_dtype_decodes_the_same_codes(checkpoint, plain, token_ids):
    model = load(checkpoint, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS), arithmetic="exact")
    wide = decoded(plain.double(), deepcopy(model).to(torch.float64))
    with torch.no_grad():
        assert torch.equal(model.to(torch.float64)(input_ids=token_ids).logits, wide(input_ids=token_ids).logits)
    plain.float()


def test_a_copy_of_a_quantized_model_shares_its_store(checkpoint, plain, token_ids):
    model = load(checkpoint, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS))
    with torch.no_grad():
        first = model(input_ids=token_ids).logits
        twin = deepcopy(model)
        model.moe_offload.close()
        assert torch.equal(twin(input_ids=token_ids).logits, first)


def test_dense_layers_are_quantized_but_embeddings_routers_and_the_head(checkpoint, plain):
    model = load(checkpoint, plain, dense=HqqFormat(**SMALL_GROUPS))
    packed = {path for path, module in model.named_modules() if isinstance(module, HqqLinear)}
    assert packed == {path for path, _ in plain.named_modules() if path.endswith(LINEARS)}
    assert all("experts" not in path for path in packed)


def test_a_model_with_dense_layers_in_low_bits_computes_with_the_decoded_weights(checkpoint, plain, token_ids):
    model = load(
        checkpoint, plain, dense=HqqFormat(nbits=8, **SMALL_GROUPS), experts=HqqFormat(nbits=8, **SMALL_GROUPS)
    )
    with torch.no_grad():
        got = model(input_ids=token_ids).logits
    twin = decoded(plain, model)
    with torch.no_grad():
        torch.testing.assert_close(got, twin(input_ids=token_ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_dense_layers_in_low_bits():
    torch.manual_seed(0)
    linear = nn.Linear(64, 24, dtype=torch.float64)
    packed = HqqLinear.quantize(linear, HqqFormat())
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    (packed(x) ** 2).sum().backward()
    ours, x.grad = x.grad, None
    (packed.dequantized()(x) ** 2).sum().backward()
    torch.testing.assert_close(ours, x.grad, atol=1e-3, rtol=1e-3)


def test_casting_a_layer_in_low_bits_leaves_its_codes_and_scales_alone():
    packed = HqqLinear.quantize(nn.Linear(64, 24), HqqFormat(meta_nbits=16))
    before = {name: buffer.clone() for name, buffer in packed.named_buffers()}
    packed.to(torch.bfloat16)
    assert packed.weight.dtype == packed.bias.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in packed.named_buffers())


def test_a_group_size_that_does_not_fit_is_refused_with_the_sizes(checkpoint, plain):
    with pytest.raises(ConfigError, match=r"group_size=128 does not divide the \d+ inputs"):
        load(checkpoint, plain, experts=HqqFormat(group_size=128))


def test_a_layer_that_the_model_does_not_have_is_refused(checkpoint, plain):
    with pytest.raises(ConfigError, match=r"sparse layer '7-9', but the model has \d"):
        load(checkpoint, plain, experts={"layers": {"7-9": {"group_size": 16}}})


def test_auto_classes_take_the_format_as_a_dictionary(checkpoint, token_ids):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, moe_offload={"experts": {"nbits": 4, "group_size": 16}, "cache_budget": "25%"}
    )
    with torch.no_grad():
        model(input_ids=token_ids)
    assert model.moe_offload.stats().misses > 0


def test_rounding_activations_to_8_bits_is_asked_for_by_name_and_a_little_off(checkpoint, plain, token_ids):
    options = {"experts": HqqFormat(**SMALL_GROUPS), "dense": HqqFormat(**SMALL_GROUPS)}
    with torch.no_grad():
        exact = load(checkpoint, plain, **options)(input_ids=token_ids).logits
        rounded = load(checkpoint, plain, arithmetic="int8", **options)(input_ids=token_ids).logits
        again = load(checkpoint, plain, arithmetic="int8", cache_budget="20%", mmap=False, **options)
        assert torch.equal(again(input_ids=token_ids).logits, rounded)
    error = (rounded - exact).norm() / exact.norm()
    assert error < 0.05
    if "not there" not in kernels.available()["cpu"]:
        assert error > 0


def test_experts_quantized_while_loading_are_said_to_be_in_ram(tmp_path):
    plain = build("qwen3_moe", torch.bfloat16)
    save(plain, tmp_path, "fused")
    model = load(tmp_path, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS), cache_budget="25%")
    assert str(model.moe_offload.plan).endswith("experts beyond the cache are in RAM")


def test_experts_that_a_container_has_no_ram_for_are_refused_whatever_the_machine_has(tmp_path, monkeypatch):
    plain = build("qwen3_moe", torch.bfloat16)
    save(plain, tmp_path, "fused")
    monkeypatch.setattr(free_memory, "memory_left", lambda: 1000)
    with pytest.raises(ConfigError, match=r"quantized experts take [\d,]+ bytes of RAM, of which 1,000 are free"):
        load(tmp_path, plain, experts=HqqFormat(nbits=4, **SMALL_GROUPS), cache_budget="25%")
