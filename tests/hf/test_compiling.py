"""`torch.compile` takes an offloaded model in one piece, experts apart, and what it computes is the same."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import HqqFormat, OffloadConfig
from transformers_moe_offload.routing import record_routing, set_routing

from .decoding import SMALL, Pieces, load, prompt, save

NUM_LAYERS = 10
"""More than torch compiles of one piece of code, were each layer compiled by itself."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint with many layers."""
    folder = tmp_path_factory.mktemp("deep")
    few = SMALL["qwen3_moe"]["num_hidden_layers"]
    SMALL["qwen3_moe"]["num_hidden_layers"] = NUM_LAYERS
    try:
        save("qwen3_moe", folder)
    finally:
        SMALL["qwen3_moe"]["num_hidden_layers"] = few
    return folder


def compiled(model, *, fullgraph=True):
    """The model's call, compiled, and the pieces that it is compiled in."""
    pieces = Pieces()
    torch.compiler.reset()
    return torch.compile(model.__call__, backend=pieces, fullgraph=fullgraph), pieces


def test_all_layers_are_one_piece_and_give_what_the_model_gives(deep):
    model = load(deep, budget="20%")
    call, pieces = compiled(model)
    with torch.no_grad():
        for seed in range(2):
            ids = prompt(2, 5, seed)
            torch.testing.assert_close(call(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(pieces.sizes) == 1
    assert pieces.num_runs == 2
    assert model.moe_offload.stats().asked > 0


def test_a_layer_finds_its_experts_after_the_cache_is_resized_and_a_copy_finds_its_own(deep):
    model = load(deep)
    ids = prompt(1, 5)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        call, pieces = compiled(model)
        call(ids, use_cache=False)
        model.moe_offload.resize("20%")
        torch.testing.assert_close(call(ids, use_cache=False).logits, expected)
        twin = copy.deepcopy(model)
        model.moe_offload.close()
        of_twin, _ = compiled(twin)
        torch.testing.assert_close(of_twin(ids, use_cache=False).logits, expected)
    assert len(pieces.sizes) == 1
    assert twin.moe_offload.stats().asked > 0


def test_gradients_flow_through_what_was_compiled(small_checkpoint):
    model = load(small_checkpoint)
    ids = prompt(1, 5)
    model(ids, labels=ids).loss.backward()
    embeddings = model.get_input_embeddings().weight
    expected, embeddings.grad = embeddings.grad, None
    call, pieces = compiled(model, fullgraph=False)
    call(ids, labels=ids).loss.backward()
    torch.testing.assert_close(embeddings.grad, expected)
    assert len(pieces.sizes) > 1


def test_quantized_dense_layers_are_part_of_the_piece(packable_checkpoint):
    """Their kernels are nothing that torch could look into."""
    format = HqqFormat(nbits=3, group_size=16)
    model = load(packable_checkpoint, experts=format, dense=format, lm_head=format)
    call, pieces = compiled(model)
    ids = prompt(1, 5)
    with torch.no_grad():
        for number in (ids, ids[:, :1]):
            torch.testing.assert_close(call(number, use_cache=False).logits, model(number, use_cache=False).logits)
    assert pieces.num_runs == 2


def test_experts_that_compute_with_the_models_own_code_stay_between_the_pieces(small_checkpoint):
    config = OffloadConfig(cache_budget="50%", arithmetic="exact")
    model = AutoModelForCausalLM.from_pretrained(small_checkpoint, moe_offload=config)
    call, pieces = compiled(model, fullgraph=False)
    ids = prompt(1, 5)
    with torch.no_grad():
        torch.testing.assert_close(call(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(pieces.sizes) > 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="arithmetic of its own is not compiled"):
        compiled(model)[0](ids, use_cache=False)


def test_autocast_reaches_the_experts_of_a_compiled_model(small_checkpoint):
    model = load(small_checkpoint)
    ids = prompt(1, 5)
    call, _ = compiled(model, fullgraph=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_recording_or_a_strategy_is_compiled_along_if_it_is_there_before(small_checkpoint):
    model = load(small_checkpoint)
    ids = prompt(1, 5)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with set_routing(model, "random", seed=0):
            expected = model(ids, use_cache=False).logits
        with set_routing(model, "random", seed=0), record_routing(model) as recorder:
            call, _ = compiled(model, fullgraph=False)
            found = call(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, plain)
    assert recorder.trace.num_tokens == 5
