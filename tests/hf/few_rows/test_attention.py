"""Attention by the kernels gives what a layer gives itself; its own forward runs where kernels do something else."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.hf.few_rows.attention import FewRowsAttention
from transformers_moe_offload.hf.few_rows.attention_trial import attention_of
from transformers_moe_offload.hf.few_rows.swap import restore_forwards, use_kernels
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.upstream import kv_cache_parameter
from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.attention import AttentionKernel
from zoo.build import build, zoo_names

from ..conftest import TINY_MOE

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")

LOOKS_AT_POSITIONS = {"llama4", "llama4_text"}
LEAVES_TOKENS_OUT = {"minimax_m3_vl"}


@pytest.fixture
def attended(monkeypatch):
    """How many texts each call of the kernel was for."""
    calls, attend = [], AttentionKernel.attend

    def counted(self, queries, keys, values):
        calls.append(len(queries))
        return attend(self, queries, keys, values)

    monkeypatch.setattr(AttentionKernel, "attend", counted)
    return calls


def layers(model):
    return [module for module in model.modules() if isinstance(module, FewRowsAttention)]


def swapped(name, dtype=torch.float32):
    model = build(name, dtype).eval()
    use_kernels(model, [path for path, _, _ in find_experts(model)])
    return model


def outputs_of(layer, hidden, turns, texts):
    """What a layer gives for some tokens, one after another."""
    cache, name = DynamicCache(), kv_cache_parameter(layer.plain_class.forward)
    with torch.no_grad():
        for rows, turn in zip(hidden, turns, strict=True):
            arguments = {"hidden_states": rows[:texts], "attention_mask": None, name: cache}
            yield layer(**arguments, position_embeddings=tuple(one[:texts] for one in turn))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", zoo_names())
def test_a_layer_gives_what_it_gives_itself(name, dtype, attended):
    model = swapped(name, dtype)
    for layer in layers(model)[:3]:
        random = torch.Generator().manual_seed(1)
        width = (layer.how.rotary_dims or (layer.how.head_dim,))[0]
        hidden = torch.randn(4, 2, 1, layer.q_proj.in_features, generator=random).to(dtype)
        turns = torch.randn(4, 2, 2, 1, width, generator=random).to(dtype)
        attended.clear()
        found = list(outputs_of(layer, hidden, turns, 2))
        assert attended == [2] * 4
        own = deepcopy(layer)
        own.__class__ = layer.plain_class
        own.plain_class = layer.plain_class
        for one, other in zip(found, outputs_of(own, hidden, turns, 2), strict=True):
            assert one.dtype == dtype
            assert (one - other).norm() < (0.05 if dtype == torch.bfloat16 else 1e-5) * other.norm()


def test_layers_that_look_at_positions_or_leave_tokens_out_attend_themselves():
    for name in LOOKS_AT_POSITIONS | LEAVES_TOKENS_OUT:
        assert not layers(swapped(name)), name


def test_a_layer_that_clips_is_recognised():
    model = build("olmoe", torch.float32)
    model.config.clip_qkv = 2.0
    assert attention_of(next(module for module in model.modules() if hasattr(module, "q_proj"))) is None


@pytest.fixture
def model():
    loaded = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="100%"))
    return loaded.eval()


def step(model, cache=None, tokens=((7,),), **kwargs):
    """Logits of the tokens after twelve others."""
    name = kv_cache_parameter(type(model).forward)
    with torch.no_grad():
        if cache is None:
            cache = DynamicCache(config=model.config)
            model(torch.arange(12)[None].expand(len(tokens), -1), use_cache=True, **{name: cache})
        return model(torch.tensor(tokens), use_cache=True, **{name: cache}, **kwargs).logits


def test_a_step_attends_once_a_layer_and_says_the_same(model, attended):
    found = step(model)
    assert attended == [1] * 8
    restore_forwards(model)
    expected = step(model)
    assert len(attended) == 8
    assert (found - expected).abs().max() < 0.05 * expected.std()


def test_texts_of_one_length_are_attended_together(attended):
    # Prompts of one text and of three are added up in another order, so a router in bfloat16 may choose another expert.
    config = OffloadConfig(cache_budget="100%")
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config, dtype=torch.float32).eval()
    attended.clear()  # layers were tried
    together = step(model, tokens=((7,), (9,), (11,)))
    assert attended == [3] * 8
    apart = torch.cat([step(model, tokens=((token,),)) for token in (7, 9, 11)])
    assert (together - apart).abs().max() < 1e-4 * apart.std()


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_in_low_bits_attend_by_the_kernels(bits, attended):
    format = HqqFormat(nbits=bits, group_size=32)
    config = OffloadConfig(cache_budget="100%", experts=format, dense=format)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
    attended.clear()
    found = step(model)
    assert attended == [1] * 8
    for layer in layers(model):
        layer.__class__ = layer.plain_class
    expected = step(model)
    assert len(attended) == 8
    assert (found - expected).abs().max() < 0.1 * expected.std()


def add_hook(model):
    model.model.layers[3].self_attn.o_proj.register_forward_hook(lambda *_: None)


def replace_forward(model):
    layer = model.model.layers[3].self_attn
    layer.k_proj.forward = layer.k_proj.forward


def parametrize(model):
    torch.nn.utils.parametrize.register_parametrization(
        model.model.layers[3].self_attn.v_proj, "weight", torch.nn.Identity()
    )


def change_scaling(model):
    model.model.layers[3].self_attn.scaling = 0.5


@pytest.mark.parametrize("change", [add_hook, replace_forward, parametrize, change_scaling])
def test_a_changed_layer_attends_itself_and_the_others_by_the_kernels(change, model, attended):
    change(model)
    step(model)
    assert attended == [1] * 7


def test_what_kernels_do_not_compute_is_left_to_the_layers(model, attended):
    padded = torch.ones(2, 13, dtype=torch.int64)
    padded[0, :3] = 0
    step(model, tokens=((7,), (9,)), attention_mask=padded)
    step(model, cache=StaticCache(model.config, 20))
    step(model, tokens=((7, 8),))
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    model.set_attn_implementation("eager")
    assert step(model, output_attentions=True) is not None
    model.set_attn_implementation("sdpa")
    model.train()
    step(model)
    assert attended == []
    model.eval()
    step(model)
    assert attended == [1] * 8


def test_hooks_of_all_modules_see_the_linear_layers_inside(model, attended):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        step(model)
    finally:
        handle.remove()
    assert model.model.layers[0].self_attn.q_proj in seen
    assert attended == []


def test_weights_that_are_replaced_are_used(model, attended):
    before, projection = step(model), model.model.layers[0].self_attn.v_proj
    projection.weight.data = -projection.weight.data
    changed = step(model)
    assert (changed - before).abs().max() > 0.1 * before.std()
    restore_forwards(model)
    assert (changed - step(model)).abs().max() < 0.05 * before.std()
    assert attended == [1] * 16


def test_a_weight_of_another_shape_in_the_same_place_is_noticed(model, attended):
    layer, name = layers(model)[0], kv_cache_parameter(layers(model)[0].plain_class.forward)
    width = layer.o_proj.out_features
    arguments = {
        "hidden_states": torch.randn(1, 1, layer.q_proj.in_features).bfloat16(),
        "position_embeddings": torch.randn(2, 1, 1, layer.how.rotary_dims[0]).bfloat16().unbind(),
    }
    with torch.no_grad():
        whole, _ = layer(**arguments, **{name: DynamicCache()})
        layer.o_proj.weight.data = layer.o_proj.weight.data[: width // 2]
        half, _ = layer(**arguments, **{name: DynamicCache()})
    assert attended == [1, 1]
    assert torch.equal(half, whole[..., : width // 2])


def test_a_copy_of_a_model_attends_with_its_own_weights(model, attended):
    before = step(model)
    copy = deepcopy(model)
    with torch.no_grad():
        for layer in layers(copy):
            layer.o_proj.weight.zero_()
    assert not torch.equal(step(copy), before)
    assert torch.equal(step(model), before)
    assert attended == [1] * 24


def test_long_texts_are_read_in_spans(attended):
    model = swapped("qwen3_moe")
    ids = torch.randint(0, model.config.vocab_size, (1, 700), generator=torch.Generator().manual_seed(0))
    name = kv_cache_parameter(type(model).forward)
    attended.clear()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], use_cache=True, **{name: cache})
        found = model(ids[:, -1:], use_cache=True, **{name: cache}).logits
        assert attended == [1] * 4
        expected = model(ids, use_cache=False).logits[:, -1:]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_beams_and_samples_are_those_of_the_model_itself(model, attended):
    prompt = torch.arange(3, 15)[None]
    found = model.generate(prompt, max_new_tokens=12, num_beams=3, do_sample=False)
    assert attended
    restore_forwards(model)
    assert torch.equal(found, model.generate(prompt, max_new_tokens=12, num_beams=3, do_sample=False))
