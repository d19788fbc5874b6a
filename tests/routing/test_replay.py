"""Replaying recorded experts: the same ones for the same tokens, however they are read."""

import copy
import gc

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from recorded import PROMPTS, generation, recording
from transformers_moe_offload import OffloadConfig, cache_stats, routing
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.routing.sites import find_sites
from transformers_moe_offload.tracing import TraceError
from zoo.build import build, failure_of_stock


def routes(trace):
    """The experts of every text, by its tokens."""
    return {tuple(trace.token_ids(text).tolist()): trace.routed_experts(text).tolist() for text in trace.texts}


def test_a_text_gets_its_recorded_experts_alone_padded_on_either_side_in_chunks_and_token_by_token(plain, strange):
    expected = routes(strange)
    texts = list(expected)
    width = max(map(len, texts))
    right = torch.tensor([[*text, *[0] * (width - len(text))] for text in reversed(texts)])

    def in_chunks(text, step):
        past = {}
        for start in range(0, len(text), step):
            outputs = plain(torch.tensor([text[start : start + step]]), use_cache=True, **past)
            past = kv_cache_argument(plain, outputs)

    with routing.set_routing(plain, "replay", trace=strange):
        alone = recording(plain, lambda: [plain(torch.tensor([text])) for text in texts])
        padded = recording(plain, lambda: plain(right, attention_mask=(right != 0).long()))
        chunked = recording(plain, lambda: [in_chunks(text, 3) for text in texts])
        stepwise = recording(plain, lambda: [in_chunks(text, 1) for text in texts])
    assert routes(alone) == routes(padded) == routes(chunked) == routes(stepwise) == expected


def test_a_generation_is_repeated_bit_by_bit(plain, offloaded):
    whole = {"attention_mask": None, "output_logits": True, "return_dict_in_generate": True}  # padding has no route
    with routing.set_routing(plain, "random", seed=5), routing.record_routing(plain) as recorder:
        written = generation(plain, **whole)
    for model in (plain, offloaded):
        with routing.set_routing(model, "replay", trace=recorder.trace):
            again = generation(model, **whole)
        assert torch.equal(again.sequences, written.sequences)
        assert all(torch.equal(one, other) for one, other in zip(again.logits, written.logits, strict=True))
    assert cache_stats(offloaded).misses > 0


def test_a_static_cache_and_a_draft_that_is_rejected_are_followed(plain, strange):
    draft = copy.deepcopy(plain)
    for parameter in draft.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with routing.set_routing(plain, "random", seed=7), routing.record_routing(plain) as recorder:
        own = plain.generate(PROMPTS[2:], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with routing.set_routing(plain, "replay", trace=recorder.trace, missing="router"):
        static = plain.generate(
            PROMPTS[2:], max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation="static"
        )
        assisted = plain.generate(
            PROMPTS[2:], max_new_tokens=8, min_new_tokens=8, do_sample=False, assistant_model=draft
        )
    assert torch.equal(static, own)
    assert torch.equal(assisted, own)


def test_beams_are_followed_where_their_rows_go(plain):
    """All that the beams read is recorded, each as a text; another router than the model's own wrote them."""
    read_so_far = set()

    def note(row, ids):
        text = [token for token in ids.tolist() if token]
        read_so_far.add(tuple(text))
        return list(range(1, 96))

    settings = {"num_beams": 3, "num_return_sequences": 3, "prefix_allowed_tokens_fn": note}
    with routing.set_routing(plain, "hash", seed=3):
        written = generation(plain, **settings)
        trace = recording(plain, lambda: [plain(torch.tensor([text])) for text in sorted(read_so_far)])
    assert not torch.equal(generation(plain, **settings), written)
    with routing.set_routing(plain, "replay", trace=trace):
        assert torch.equal(generation(plain, **settings), written)


@pytest.mark.parametrize(
    "name", ["dbrx", "deepseek_v3", "gpt_oss", "jetmoe", "llama4_text", "mixtral", "phimoe", "zaya"]
)
def test_recorded_weights_are_those_of_every_way_to_answer(name):
    """Also after the routers have changed."""
    if failure_of_stock(name) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(name)!r}")
    model = build(name).eval()
    text = torch.tensor([[1, 2, 3, 4, 5]])
    logits = []
    with routing.set_routing(model, "random", seed=5):
        trace = recording(model, lambda: logits.append(model(text).logits))
    for site in find_sites(model):
        for parameter in site.module.parameters():
            parameter.data *= 1.5
    with routing.set_routing(model, "replay", trace=trace, weights="recorded"):
        again = recording(model, lambda: model(text))
    for router in range(len(trace.routers)):
        assert np.array_equal(trace.whole_texts.experts[router], again.whole_texts.experts[router])
        assert np.array_equal(trace.whole_texts.weights[router], again.whole_texts.weights[router])
    if find_sites(model)[0].ends_at is None and name != "jetmoe":  # the block, or attention, was scaled as well
        with routing.set_routing(model, "replay", trace=trace, weights="recorded"):
            torch.testing.assert_close(model(text).logits, logits[0])


def test_experts_in_low_bits_and_continuous_batching(checkpoint):
    config = OffloadConfig(cache_budget="50%", experts={"nbits": 4, "group_size": 16})
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    with routing.set_routing(model, "random", seed=5), routing.record_routing(model) as recorder:
        written = generation(model, attention_mask=None)
    with routing.set_routing(model, "replay", trace=recorder.trace):
        assert torch.equal(generation(model, attention_mask=None), written)
        # Its cache does not tell which texts it holds.
        settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
        failed = model.generate_batch([[1, 2, 3]], generation_config=settings, progress_bar=False)
        assert all("position of every new token, is unknown" in one.error for one in failed.values())


def test_weights_are_the_routers_own_or_the_recorded_ones(plain, strange):
    text = torch.tensor([strange.token_ids(0).tolist()])
    changed = copy.deepcopy(plain)
    for name, parameter in changed.named_parameters():
        if ".gate." in name:
            parameter.data *= 3
    for weights in ("router", "recorded"):
        with routing.set_routing(changed, "replay", trace=strange, weights=weights):
            found = recording(changed, lambda: changed(text))
        assert routes(found)[tuple(text[0].tolist())] == strange.routed_experts(0).tolist()
        recorded, replayed = strange.whole_texts.weights[0], found.whole_texts.weights[0]
        is_recorded = np.array_equal(recorded[: text.shape[1]], replayed)
        assert is_recorded == (weights == "recorded")


def test_a_token_past_the_end_of_the_trace_is_named(plain, strange):
    text = strange.token_ids(0).tolist()
    with routing.set_routing(plain, "replay", trace=strange), torch.no_grad():
        mask = torch.ones(2, len(text) + 1, dtype=torch.int64)
        mask[0, -1] = 0
        with pytest.raises(TraceError, match=rf"no route of token {len(text)} \(id 7\) of row 1"):
            plain(torch.tensor([[*text, 0], [*text, 7]]), attention_mask=mask)
        with pytest.raises(TraceError, match=r"no route of token 2 \(id 9\) of row 0"):
            plain(torch.tensor([[*text[:2], 9]]))
        plain(torch.tensor([text]))  # and it still works


def test_only_the_token_that_a_rollout_has_sampled_last_is_left_to_the_router(plain, strange):
    text = strange.token_ids(0).tolist()
    with routing.set_routing(plain, "replay", trace=strange, missing="last"), torch.no_grad():
        found = recording(plain, lambda: plain(torch.tensor([[*text, 7]])))
        outputs = plain(torch.tensor([text]), use_cache=True)
        plain(torch.tensor([[7]]), **kv_cache_argument(plain, outputs))
        for more in ([*text, 7, 8], [*text[:-1], 7], [7], [*text[:3], 7]):
            with pytest.raises(TraceError, match="no route of token"):
                plain(torch.tensor([more]))
    assert found.routed_experts(0)[:-1].tolist() == strange.routed_experts(0).tolist()
    with routing.set_routing(plain, "replay", trace=strange, missing="router"), torch.no_grad():
        plain(torch.tensor([[*text, 7, 8], [7, *text, 8]]))


def test_of_texts_with_the_same_tokens_the_first_is_replayed_and_rather_one_that_ends_there(plain):
    short, long = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3, 4]])

    def drawn(seed, text):
        with routing.set_routing(plain, "random", seed=seed):
            return recording(plain, lambda: plain(text)).routed_experts(0)

    pairs = [(long, drawn(1, long)), (short, drawn(2, short)), (short, drawn(3, short))]
    trace = routing.RoutingTrace.from_routed_experts(plain, [t[0] for t, _ in pairs], [r for _, r in pairs])
    with routing.set_routing(plain, "replay", trace=trace, missing="last"):
        found = recording(plain, lambda: [plain(torch.tensor([text])) for text in ([1, 2, 3, 4], [1, 2, 3, 9])])
    assert found.routed_experts(0).tolist() == pairs[0][1].tolist()
    assert found.routed_experts(1)[:-1].tolist() == pairs[1][1].tolist()


def test_rows_with_fewer_experts_and_rows_with_more_are_replayed(plain):
    text = torch.tensor([[1, 2, 3, 4, 5]])
    for strategy, options in (("top_p", {"p": 0.3}), ("top_k", {"k": 5})):
        with routing.set_routing(plain, strategy, **options):
            trace, logits = recording(plain, lambda: plain(text)), plain(text).logits
        with routing.set_routing(plain, "replay", trace=trace):
            torch.testing.assert_close(plain(text).logits, logits)
        with routing.set_routing(plain, "replay", trace=trace, missing="last"), torch.no_grad():
            plain(torch.tensor([[1, 2, 3, 4, 5, 6]]))


def test_gradients_reach_the_router_and_checkpointing_repeats_the_experts(plain, strange):
    ids = torch.tensor([strange.token_ids(2).tolist()])
    gradients = []
    for checkpoints in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = copy.deepcopy(plain).train()
        if checkpoints is not None:
            model.activation_checkpointing_enable(checkpoints)
        with routing.set_routing(model, "replay", trace=strange):
            model.enable_input_require_grads()
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert any(".gate." in name and one.abs().max() > 0 for name, one in gradients[0].items())
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][name], other[name]) for name in gradients[0])


def test_a_layer_is_repeated_for_the_forward_whose_gradients_are_asked_for(plain, strange):
    """Two forwards with gradients, then one without, and only then the backward of all."""
    texts = [torch.tensor([strange.token_ids(text).tolist()]) for text in (2, 1)]
    texts[0] = texts[0][:, : texts[1].shape[1]]  # as many tokens in both
    gradients = []
    for checkpoints in (False, True):
        model = copy.deepcopy(plain).train()
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with routing.set_routing(model, "replay", trace=strange):
            loss = sum(model(input_ids=text, labels=text).loss for text in texts)
            with torch.no_grad():
                model(input_ids=texts[1][:, :3])
            loss.backward()
        gradients.append([one.grad for one in model.parameters() if one.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_peft_model_and_a_copy_replay(plain, strange):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], init_lora_weights=False)
    text = strange.token_ids(2).tolist()
    routing.set_routing(plain, "replay", trace=strange)
    twin = copy.deepcopy(plain)
    routing.reset(plain)
    adapted = peft.get_peft_model(plain, config)
    routing.set_routing(adapted, "replay", trace=strange)
    for model in (twin, adapted):
        found = recording(model, lambda model=model: model(torch.tensor([text])))
        assert found.routed_experts(0).tolist() == strange.routed_experts(2).tolist()
    routing.reset(adapted)
    found = recording(adapted, lambda: adapted(torch.tensor([text])))
    assert found.routed_experts(0).tolist() != strange.routed_experts(2).tolist()


def test_a_model_that_is_dropped_with_its_strategy_is_no_longer_listened_to(plain, strange):
    twin = copy.deepcopy(plain)
    routing.set_routing(twin, "replay", trace=strange)
    routing.set_routing(copy.deepcopy(twin), "replay", trace=strange)
    gc.collect()
    assert hasattr(DynamicCache.reorder_cache, "__wrapped__")
    del twin
    gc.collect()
    assert not hasattr(DynamicCache.reorder_cache, "__wrapped__")
