"""Routers that prefer residents: what is chosen, when, and what the models that do so can be used with."""

# T tokens, K experts per token, E experts

import copy
import dataclasses
import json
from functools import partial

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from hurried import run_at_once
from transformers_moe_offload import (
    CacheAwareConfig,
    ConfigError,
    HqqFormat,
    OffloadConfig,
    cache_stats,
    restore,
    routing,
)
from transformers_moe_offload.hf.upstream import kv_cache_argument
from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.few_rows import Preference, Route, routed
from transformers_moe_offload.routing import RouterCall
from transformers_moe_offload.routing.strategies import CacheAware
from transformers_moe_offload.tracing import replay

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the kernels were not built")

NEVER = -torch.inf
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
LONGER = {"max_new_tokens": 40, "min_new_tokens": 40}


# What is chosen, from scores written down by hand.


def chosen(scores, resident, strategy, *, top_k=2, memory=None, **facts):
    """The experts of each token, in the order in which they are returned; `scores` are affinities."""
    call = RouterCall(
        torch.tensor(scores),
        top_k,
        has_affinities=facts.pop("has_affinities", True),
        is_step=facts.pop("is_step", True),
        layer=facts.pop("layer", 1),
        memory=strategy.memory() if memory is None else memory,
        find_resident=lambda: None if resident is None else torch.tensor(resident, dtype=torch.bool),
        **facts,
    )
    choice = strategy.choose(call)
    return None if choice is None else choice.experts.tolist()


def test_a_resident_is_taken_before_an_expert_that_is_better_by_less_than_the_bonus():
    scores = [[0.5, 0.3, 0.2, 0.0]]  # a range of 0.5
    assert chosen(scores, [0, 0, 1, 0], CacheAware(strength=0.1)) == [[0, 1]]
    assert chosen(scores, [0, 0, 1, 0], CacheAware(strength=0.3)) == [[0, 2]]


def test_the_best_experts_are_protected_and_only_they():
    scores, resident = [[0.4, 0.3, 0.2, 0.1]], [0, 0, 1, 1]
    assert chosen(scores, resident, CacheAware(strength=1.0)) == [[0, 2]]
    assert chosen(scores, resident, CacheAware(strength=1.0, protect=0)) == [[2, 3]]
    assert chosen(scores, resident, CacheAware(strength=1.0, protect=2), top_k=3) == [[0, 1, 2]]


def test_chosen_experts_are_in_the_order_of_their_own_scores():
    scores = [[0.5, 0.1, 0.4, 0.3], [0.0, 0.5, 0.45, 0.4]]
    assert chosen(scores, [0, 1, 0, 1], CacheAware(strength=1.0), top_k=3) == [[0, 3, 1], [1, 2, 3]]


def test_the_bonus_is_a_share_of_the_mean_range_of_all_tokens_so_far():
    strategy = CacheAware(strength=0.1)
    memory, near = strategy.memory(), [[0.6, 0.25, 0.2, 0.0]]
    assert chosen(near, [0, 0, 1, 0], strategy, memory=memory) == [[0, 2]]  # 0.06 a resident
    chosen([[0.2, 0.0, 0.0, 0.0]] * 9, None, strategy, memory=memory, is_step=False)  # prompts count, too
    assert chosen(near, [0, 0, 1, 0], strategy, memory=memory) == [[0, 1]]  # (0.6 + 9 * 0.2 + 0.6) / 11 * 0.1 = 0.027


def test_the_first_router_raises_residents_by_half_as_much():
    scores, resident = [[0.5, 0.3, 0.2, 0.0]], [0, 0, 1, 0]
    assert chosen(scores, resident, CacheAware(strength=0.3), layer=1) == [[0, 2]]
    assert chosen(scores, resident, CacheAware(strength=0.3), layer=0) == [[0, 1]]
    assert chosen(scores, resident, CacheAware(strength=0.6), layer=0) == [[0, 2]]


def test_routers_that_a_strategy_is_set_for_share_one_mean_and_copies_have_their_own(checkpoint, long_text):
    @dataclasses.dataclass(frozen=True)
    class Notes(routing.RoutingStrategy):
        def memory(self):
            return []

        def choose(self, call):
            call.memory.append(call.layer)
            seen.append(call.memory)

    seen, model = [], load(checkpoint)
    routing.set_routing(model, Notes())
    steps(model, long_text[:, :2])
    twin = copy.deepcopy(model)
    steps(twin, long_text[:, :1])
    assert [id(memory) for memory in seen] == [id(seen[0])] * 8 + [id(seen[-1])] * 4
    assert seen[0] == [0, 1, 2, 3] * 2
    assert seen[-1] == [0, 1, 2, 3] * 3, "the copy goes on from what the original remembers"


def test_prompts_and_layers_where_nothing_has_to_be_loaded_are_left_to_the_router():
    strategy = CacheAware(strength=1.0)
    assert chosen([[0.1, 0.2, 0.3]], [1, 0, 0], strategy, is_step=False) is None
    assert chosen([[0.1, 0.2, 0.3]], None, strategy) is None
    assert chosen([[0.1, 0.2, 0.3]], [1, 0, 0], CacheAware(strength=0)) is None


def test_experts_that_the_architecture_rules_out_stay_out_and_their_scores_are_no_part_of_the_range():
    scores = [[NEVER, 0.9, 0.8, 0.3]]  # a range of 0.6
    assert chosen(scores, [1, 0, 0, 1], CacheAware(strength=0.7)) == [[1, 2]]
    assert chosen(scores, [1, 0, 0, 1], CacheAware(strength=0.9)) == [[1, 3]]


def test_affinities_may_be_corrected_below_zero_and_logits_are_compared_by_their_softmax():
    corrected, resident = [[1.2, 0.3, -0.1, -0.3]], [0, 0, 1, 0]  # a range of 1.5, of which 0.4 is the difference
    assert chosen(corrected, resident, CacheAware(strength=0.2)) == [[0, 1]]
    assert chosen(corrected, resident, CacheAware(strength=0.3)) == [[0, 2]]
    logits = torch.tensor([[0.5, 0.3, 0.2, 1e-9]]).log().tolist()
    assert chosen(logits, resident, CacheAware(strength=0.1), has_affinities=False) == [[0, 1]]
    assert chosen(logits, resident, CacheAware(strength=0.3), has_affinities=False) == [[0, 2]]


def test_experts_that_are_looked_up_by_token_id_are_left_to_the_router():
    assert chosen([[0.1, 0.2, 0.3]], [1, 0, 0], CacheAware(strength=1.0), is_ranked=False) is None


def test_scores_beyond_the_last_expert_count_as_resident():
    assert chosen([[0.4, 0.3, 0.29]], [0, 0], CacheAware(strength=0.5)) == [[0, 2]]


@needs_kernels
@pytest.mark.parametrize(("is_sigmoid", "is_late"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("protect", [0, 1, 2, 3])
def test_the_compiled_kernels_prefer_what_the_strategy_prefers(is_sigmoid, is_late, protect):
    random, num_displaced = torch.Generator().manual_seed(protect), 0
    weight, strategy = torch.randn(12, 16, generator=random), CacheAware(strength=0.3, protect=protect)
    route = Route(4, is_sigmoid, is_late, normalises=True, dtype=torch.float32)
    memory, sums = strategy.memory(), torch.zeros(2, dtype=torch.float64)
    for step in range(20):
        rows = torch.randn(1 + step % 3, 16, generator=random)
        resident = torch.rand(12, generator=random) < 0.4
        is_step = step % 4 != 0
        preference = Preference(resident if is_step else None, strategy.strength, protect, sums)
        logits, scores, experts = routed(rows, weight, route, preference)
        affinities = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        call = RouterCall(
            logits if is_late else affinities,
            4,
            not is_late,
            is_step=is_step,
            layer=1,
            memory=memory,
            find_resident=partial(torch.clone, resident),
        )
        expected = strategy.choose(call)
        own = affinities.topk(4).indices if expected is None else expected.experts
        assert torch.equal(experts, own)
        torch.testing.assert_close(sums, memory.sums(torch.device("cpu")))
        num_displaced += int((own.sort().values != affinities.topk(4).indices.sort().values).any(-1).sum())
        taken = affinities.gather(1, own)
        torch.testing.assert_close(scores, taken / taken.sum(-1, keepdim=True))
    assert num_displaced > 3, "the preference makes a difference"


# In a model.


def load(checkpoint, **options):
    config = OffloadConfig(**{"cache_budget": "40%", "arithmetic": "exact", "mmap": False} | options)
    return AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config).eval()


@torch.no_grad()
def steps(model, token_ids):
    """The logits of reading texts token by token, (B, S, V)."""
    found, cache = [], {}
    for token in token_ids.split(1, dim=1):
        outputs = model(input_ids=token, use_cache=True, **cache)
        cache = kv_cache_argument(model, outputs)
        found.append(outputs.logits)
    return torch.cat(found, dim=1)


@pytest.fixture(scope="module")
def long_text():
    return torch.randint(0, 96, (1, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_strength_zero_is_bit_identical_to_no_strategy(checkpoint, long_text, arithmetic):
    own = load(checkpoint, arithmetic=arithmetic)
    expected = steps(own, long_text)
    for strategy in ({"cache_aware": 0.0}, {}):
        model = load(checkpoint, arithmetic=arithmetic, **strategy)
        with routing.set_routing(model, "cache_aware", strength=0):
            assert torch.equal(steps(model, long_text), expected)
        assert cache_stats(model).misses == cache_stats(own).misses


@needs_kernels
def test_it_makes_no_difference_whether_the_kernels_choose_or_are_watched(checkpoint, long_text):
    model, watched = load(checkpoint, arithmetic="fast"), load(checkpoint, arithmetic="fast")
    routing.set_routing(model, "cache_aware", strength=0.3)
    routing.set_routing(watched, "cache_aware", strength=0.3)
    with routing.record_routing(watched):
        expected = steps(watched, long_text)
    torch.testing.assert_close(steps(model, long_text), expected, atol=1e-4, rtol=1e-4)
    assert cache_stats(model).misses == cache_stats(watched).misses
    twin = copy.deepcopy(model)
    routing.reset(model)
    assert torch.equal(steps(model, long_text), steps(load(checkpoint, arithmetic="fast"), long_text))
    assert torch.isfinite(steps(twin, long_text)).all()


def test_a_larger_strength_misses_less_and_says_that_results_depend_on_it(checkpoint, long_text):
    misses = []
    for strength in (None, 0.1, 0.3, 1.0):
        model = load(checkpoint, cache_aware=strength)
        steps(model, long_text)
        misses.append(cache_stats(model).misses)
        said = "results depend on what is resident, because routers follow CacheAware(strength="
        for shown in (str(model.moe_offload.stats()), str(model.moe_offload.plan)):
            assert (said in shown) == (strength is not None)
    assert misses == sorted(misses, reverse=True)
    assert misses[-1] < 0.6 * misses[0]


def test_a_strategy_that_is_taken_out_again_is_said_no_more(checkpoint, long_text):
    model = load(checkpoint)
    with routing.set_routing(model, "cache_aware", strength=0.5, layers=[1]):
        assert model.moe_offload.stats().follows_cache == "CacheAware(strength=0.5, protect=1)"
        twin = copy.deepcopy(model)
    assert model.moe_offload.stats().follows_cache is None
    assert twin.moe_offload.stats().follows_cache == "CacheAware(strength=0.5, protect=1)"
    routing.reset(twin)
    assert twin.moe_offload.plan.follows_cache is None


def test_prompts_are_read_as_by_the_plain_model(plain, checkpoint, token_ids):
    model = load(checkpoint, cache_aware=1.0)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, plain(token_ids).logits)


def test_the_same_cache_gives_the_same_choices_and_a_copy_goes_on_from_its_own(checkpoint, long_text):
    model, again = load(checkpoint, cache_aware=0.5), load(checkpoint, cache_aware=0.5)
    expected = steps(model, long_text)
    assert torch.equal(steps(again, long_text), expected)
    assert not torch.equal(steps(load(checkpoint), long_text), expected)
    twin = copy.deepcopy(again)
    for one in (again, twin):
        one.moe_offload.resize("70%")
    assert not torch.equal(steps(twin, long_text), steps(again, long_text)), "the twin's cache was empty"


def test_weights_are_those_that_the_router_gives_the_chosen_experts(checkpoint, long_text):
    model = load(checkpoint, cache_aware=0.5)
    with routing.record_routing(model, scores="float32") as recorder:
        steps(model, long_text)
    for router in range(4):
        for rows in recorder.trace.rows(router):
            own = torch.from_numpy(rows.scores).gather(1, torch.from_numpy(rows.experts).long())
            torch.testing.assert_close(torch.from_numpy(rows.weights), own, atol=1e-3, rtol=1e-3)
            assert (own[:, 0] >= own[:, 1]).all()


def test_the_best_expert_of_every_token_is_among_the_chosen(checkpoint, long_text):
    model = load(checkpoint, cache_aware=1.0)
    with routing.record_routing(model, scores="float32") as recorder:
        steps(model, long_text)
    for router in range(4):
        for rows in recorder.trace.rows(router):
            assert (rows.scores.argmax(-1)[:, None] == rows.experts).any(-1).all()


def test_a_recording_made_with_it_replays_to_the_hits_of_the_run(checkpoint, long_text):
    model = load(checkpoint, cache_aware=0.4)
    with model.moe_offload.trace() as trace, routing.record_routing(model) as recorder:
        steps(model, long_text)
    num_slots, hits = model.moe_offload.plan.num_slots, cache_stats(model).hits
    assert replay(trace, "lru", num_slots).hits == hits
    assert replay(recorder.trace.to_cache_trace(), "lru", num_slots).hits == hits


def test_it_follows_the_cache_as_it_is_resized_moved_and_filled_by_prefetching(checkpoint, long_text):
    model = load(checkpoint, cache_aware=0.5, prefetch={"lookahead": 1, "adaptive": False})
    steps(model, long_text)
    model.moe_offload.resize("70%")
    steps(model, long_text)
    model.to(torch.bfloat16)
    assert torch.isfinite(steps(model, long_text)).all()
    model.moe_offload.resize("100%")
    model.moe_offload.warm({path: [1] * 8 for path in cache_stats(model).per_layer})
    expected = steps(load(checkpoint).to(torch.bfloat16), long_text)
    assert torch.equal(steps(model, long_text), expected), "all experts are resident"


# What it is used with.


def fewer_misses(checkpoint, run, **options):
    """Run two models, of which one prefers residents."""
    own, ours = load(checkpoint, **options), load(checkpoint, cache_aware=0.6, **options)
    run(own)
    answer = run(ours)
    assert cache_stats(ours).misses < 0.9 * cache_stats(own).misses
    return answer


@pytest.mark.parametrize(
    "generation",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generate_in_all_its_ways_misses_less(checkpoint, token_ids, generation):
    def run(model):
        torch.manual_seed(0)
        return model.generate(token_ids[:1], **GREEDY | LONGER | generation)

    assert fewer_misses(checkpoint, run).shape == (1, 49)


def test_batches_of_texts_that_are_decoded_together_miss_less(checkpoint, token_ids):
    mask = torch.ones_like(token_ids)
    mask[0, :3] = 0

    def run(model):
        return model.generate(token_ids, attention_mask=mask, **GREEDY | LONGER)

    assert fewer_misses(checkpoint, run).shape == (2, 49)


def test_the_steps_of_an_assistant_and_of_the_model_that_it_assists_miss_less(checkpoint, token_ids):
    assistants = {}

    def run(model):
        assistants[model] = load(checkpoint, cache_aware=model.moe_offload.config.cache_aware)
        return model.generate(token_ids[:1], assistant_model=assistants[model], **GREEDY | LONGER)

    assert fewer_misses(checkpoint, run).shape == (1, 49)
    own, ours = assistants.values()
    assert cache_stats(ours).misses < cache_stats(own).misses


def test_continuous_batching_misses_less(checkpoint, token_ids):
    def run(model):
        settings = copy.deepcopy(model.generation_config)
        settings.update(**GREEDY | {"max_new_tokens": 20, "min_new_tokens": 20}, eos_token_id=-1)
        prompts = [row.tolist() for row in token_ids]
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, page_size=32)
        return model.generate_batch(prompts, settings, small, warmup=False)

    answers = fewer_misses(checkpoint, run)
    assert [len(answer.generated_tokens) for answer in answers.values()] == [20, 20]


def test_adapters_and_experts_in_low_bits_are_used_as_before(checkpoint, long_text):
    def run(model):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        return steps(wrapped.eval(), long_text)

    assert torch.isfinite(fewer_misses(checkpoint, run)).all()
    low = {"experts": HqqFormat(nbits=4, group_size=32), "arithmetic": "fast", "mmap": "auto"}
    assert torch.isfinite(fewer_misses(checkpoint, lambda model: steps(model, long_text), **low)).all()


def test_a_strategy_set_inside_of_pefts_wrapper_is_found_by_its_handle(checkpoint, long_text):
    model = load(checkpoint)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with routing.set_routing(wrapped, "cache_aware", strength=0.5):
        steps(wrapped, long_text)
        assert model.moe_offload.stats().follows_cache is not None


def test_threads_that_share_a_model_and_models_of_one_thread_keep_apart(checkpoint, long_text):
    model, other = load(checkpoint, cache_aware=0.5), load(checkpoint, cache_aware=0.5)
    expected, finite = steps(other, long_text), []
    run_at_once(lambda text: finite.append(bool(torch.isfinite(steps(model, text)).all())), [(long_text,)] * 4)
    assert finite == [True] * 4
    fresh = load(checkpoint, cache_aware=0.5)
    assert torch.equal(steps(fresh, long_text), expected)


def test_gradients_of_texts_are_those_without_it(checkpoint, token_ids):
    gradients = []
    for strength in (None, 0.5):
        model = load(checkpoint, cache_aware=strength).train()
        model.activation_checkpointing_enable()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_restored_model_has_nothing_of_it(checkpoint, plain, token_ids):
    model = restore(load(checkpoint, cache_aware=0.5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(steps(model, token_ids), steps(plain, token_ids))


# The option, and what is refused.


def test_the_option_is_a_strength_a_config_a_strategy_or_a_dictionary_and_survives_json():
    expected = CacheAwareConfig(strength=0.2, protect=1)
    for given in (0.2, expected, CacheAware(strength=0.2), {"strength": 0.2}, {"strength": 0.2, "protect": 1}):
        config = OffloadConfig(cache_aware=given)
        assert config.cache_aware == expected
        assert type(config.cache_aware) is CacheAwareConfig
        assert OffloadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert OffloadConfig.make('{"cache_aware": 0.2}').cache_aware == expected
    assert dataclasses.replace(config, cache_aware=None) == OffloadConfig()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, "strength=-0.1 of cache_aware is not a number from 0, which changes nothing, to 1"),
        (7, "strength=7 of cache_aware is not a number from 0"),
        (float("nan"), "strength=nan of cache_aware"),
        (True, "cache_aware=True is not a strength such as 0.1"),
        ("much", "cache_aware='much' is not a strength"),
        ({"protect": 2}, "has no strength; 0.1 is a good start"),
        ({"strength": 0.1, "protects": 2}, "has no option 'protects'; did you mean 'protect'"),
        ({"strength": 0.1, "protect": -1}, "protect=-1 of cache_aware is not a number of experts"),
    ],
)
def test_an_option_that_cannot_be_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(cache_aware=value)


def test_a_model_without_a_cache_and_one_with_too_few_experts_per_token_are_refused(plain, checkpoint):
    with pytest.raises(ConfigError, match="the experts of Qwen3MoeForCausalLM are not offloaded"):
        routing.set_routing(plain, "cache_aware", strength=0.1)
    assert not any(module._forward_hooks for module in plain.modules())
    with pytest.raises(
        ConfigError, match=r"protect=2, but a token takes 2 of the experts of router 0.*; protect 1 or fewer"
    ):
        load(checkpoint, cache_aware={"strength": 0.1, "protect": 2})
    with pytest.raises(ConfigError, match="strength=2 of cache_aware"):
        routing.set_routing(load(checkpoint), "cache_aware", strength=2)
