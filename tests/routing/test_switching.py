"""Strategies in a model: what they compose with, and that nothing stays behind."""

import copy

import accelerate
import peft
import pytest
import torch

from hurried import run_at_once
from transformers_moe_offload import ConfigError, MoeOffloadError, UnsupportedModelError, cache_stats, routing
from transformers_moe_offload.routing.choice import Choice
from transformers_moe_offload.routing.router_hook import RouterHook
from transformers_moe_offload.routing.sites import find_sites
from transformers_moe_offload.routing.switching import observe, stop_observing
from zoo.build import build

NUM_LAYERS = 4


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


def chosen(model, token_ids):
    """The experts that each router chooses in a forward."""
    experts = {}

    def note(layer, decision):
        experts[layer] = decision.experts

    observe(model, find_sites(model), note)
    logits(model, token_ids)
    stop_observing(model, note)
    return experts


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("strategy", ["random", "top_p", "expert_choice", "hash", "linear_assignment"])
def test_an_offloaded_model_routes_and_computes_as_the_plain_one(plain, offloaded, token_ids, strategy):
    routing.set_routing(plain, strategy)
    routing.set_routing(offloaded, strategy)
    expected, before = logits(plain, token_ids), cache_stats(offloaded)
    assert torch.equal(logits(offloaded, token_ids), expected)
    assert cache_stats(offloaded).misses > before.misses
    routing.reset(plain)
    routing.reset(offloaded)
    assert torch.equal(logits(offloaded, token_ids), logits(plain, token_ids))


def test_experts_that_only_fill_a_row_up_are_not_fetched(offloaded, token_ids):
    routing.set_routing(offloaded, "top_p", p=1e-6)
    logits(offloaded, token_ids[:1, :1])
    assert {layer.asked for layer in cache_stats(offloaded).per_layer.values()} == {1}


@pytest.mark.parametrize("generation", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 1}], ids=str)
def test_generate_follows_a_strategy(plain, offloaded, token_ids, generation):
    written = {}
    for model in (plain, offloaded):
        torch.manual_seed(0)
        with routing.set_routing(model, "random", seed=3):
            written[model] = model.generate(token_ids, max_new_tokens=6, min_new_tokens=6, **generation)
    assert torch.equal(written[plain], written[offloaded])
    torch.manual_seed(0)
    assert not torch.equal(plain.generate(token_ids, max_new_tokens=6, min_new_tokens=6, **generation), written[plain])


def test_peft_on_top_or_below_makes_no_difference(plain, token_ids):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], init_lora_weights=False)
    before = copy.deepcopy(plain)
    routing.set_routing(before, "random")
    torch.manual_seed(0)
    before = peft.get_peft_model(before, config)
    torch.manual_seed(0)
    after = peft.get_peft_model(plain, config)
    routing.set_routing(after, "random")
    assert torch.equal(logits(before, token_ids), logits(after, token_ids))
    routing.reset(before)
    routing.reset(after)
    assert torch.equal(logits(before, token_ids), logits(after, token_ids))
    assert hooks_of(before) == 0


def test_gradients_with_checkpointing_are_those_without(plain, token_ids):
    gradients = []
    for checkpoints in (False, True):
        model = copy.deepcopy(plain).train()
        if checkpoints:
            model.activation_checkpointing_enable()
        routing.set_routing(model, "random")
        for _ in range(2):
            model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_hooks_of_accelerate_are_not_in_the_way(plain, token_ids):
    accelerate.dispatch_model(plain, {"": "cpu"}, force_hooks=True)
    own = logits(plain, token_ids)
    with routing.set_routing(plain, "random"):
        assert not torch.equal(logits(plain, token_ids), own)
    assert torch.equal(logits(plain, token_ids), own)


def test_router_logits_are_still_recorded(plain, token_ids):
    routing.set_routing(plain, "random")
    recorded = plain(input_ids=token_ids, output_router_logits=True).router_logits
    assert [tuple(one.shape) for one in recorded] == [(token_ids.numel(), 8)] * NUM_LAYERS


def test_a_copy_has_strategies_of_its_own(plain, token_ids):
    own = logits(plain, token_ids)
    routing.set_routing(plain, "random")
    twin = copy.deepcopy(plain)
    assert torch.equal(logits(twin, token_ids), logits(plain, token_ids))
    routing.reset(plain)
    assert torch.equal(logits(plain, token_ids), own)
    assert not torch.equal(logits(twin, token_ids), own)


def test_strategies_are_set_by_layer_by_number_or_path(plain, token_ids):
    own = chosen(plain, token_ids)
    routing.set_routing(plain, "fixed", layers=-1, experts=[6])
    routing.set_routing(plain, "fixed", layers=[find_sites(plain)[1].path], experts=[5])
    experts = chosen(plain, token_ids)
    assert torch.equal(experts[0], own[0])
    assert set(experts[1].flatten().tolist()) == {5}
    assert set(experts[3].flatten().tolist()) == {6}
    routing.reset(plain, layers=[1])
    experts = chosen(plain, token_ids)
    assert experts[1].shape == own[1].shape
    assert set(experts[3].flatten().tolist()) == {6}


def test_a_with_block_takes_back_its_own_change_and_no_other(plain, token_ids):
    own = logits(plain, token_ids)
    with routing.set_routing(plain, "fixed", experts=[1]):
        outer = logits(plain, token_ids)
        with routing.set_routing(plain, "random") as inner:
            assert inner.seed == 0
            assert not torch.equal(logits(plain, token_ids), outer)
        assert torch.equal(logits(plain, token_ids), outer)
    assert torch.equal(logits(plain, token_ids), own)
    assert hooks_of(plain) == 0


def test_setting_a_strategy_again_repeats_its_choices_and_going_on_does_not(plain, token_ids):
    routing.set_routing(plain, "random", seed=5)
    first, second = logits(plain, token_ids), logits(plain, token_ids)
    assert not torch.equal(first, second)
    routing.set_routing(plain, "random", seed=5)
    assert torch.equal(logits(plain, token_ids), first)
    assert torch.equal(logits(plain, token_ids), second)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "layers names router 4, but the model has routers 0 to 3"),
        ([-5], "layers names router -5"),
        (["model.layers.9"], "layers names 'model.layers.9', but no router is at that path; the first is at"),
        ([], "names no router"),
    ],
)
def test_an_unknown_layer_is_refused_and_nothing_changes(plain, token_ids, layers, message):
    with pytest.raises(ConfigError, match=message):
        routing.set_routing(plain, "random", layers=layers)
    assert hooks_of(plain) == 0


def test_a_model_without_routers_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear has no routed experts"):
        routing.set_routing(torch.nn.Linear(2, 2), "random")


def test_a_forward_that_fails_leaves_the_model_usable(plain, token_ids):
    own = logits(plain, token_ids)
    with routing.set_routing(plain, "random"), pytest.raises(RuntimeError):
        plain(inputs_embeds=torch.zeros(1, 3, 5))
    with routing.set_routing(plain, "hash"), pytest.raises(UnsupportedModelError, match="pass input_ids"):
        plain(inputs_embeds=torch.zeros(1, 3, plain.config.hidden_size))
    assert torch.equal(logits(plain, token_ids), own)
    assert torch.zeros(3).topk(2).indices.shape == (2,), "torch functions are still being watched"


def test_ctrl_c_within_a_router_leaves_nothing_behind(plain, token_ids):
    """Python calls no hook then, torch would watch all functions from there on, and recordings would stay empty."""

    def interrupt(*_):
        raise KeyboardInterrupt

    expected = logits(plain, token_ids)
    routing.set_routing(plain, "random")
    hook = plain.model.layers[1].mlp.gate.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(plain, token_ids)
    hook.remove()
    with routing.record_routing(plain) as recorder:
        logits(plain, token_ids)
    assert recorder.trace.num_tokens == token_ids.numel()
    assert torch.overrides._get_current_function_mode() is None
    plain.model.layers[1].mlp.gate.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(plain, token_ids)
    plain.model.layers[1].mlp.gate._forward_pre_hooks.popitem()
    routing.reset(plain)
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(logits(plain, token_ids), expected)


@pytest.mark.parametrize(("strategy", "options"), [("top_k", {"k": 1}), ("hash", {})])
def test_threads_that_share_a_model_each_follow_its_strategy(strategy, options, plain, token_ids):
    routing.set_routing(plain, strategy, **options)
    texts = [token_ids[:, : 3 + number] for number in range(4)]
    expected, right = [logits(plain, text) for text in texts], []

    def run(text, answer):
        right.extend(torch.equal(logits(plain, text), answer) for _ in range(5))

    run_at_once(run, zip(texts, expected, strict=True))
    assert right == [True] * 20


def test_moving_an_offloaded_model_asks_its_routers_and_disturbs_no_strategy(plain, offloaded, token_ids):
    for model in (plain, offloaded):
        routing.set_routing(model, "hash").__enter__()
        model.to(torch.bfloat16)  # the prefetcher looks at the routers anew, without token ids
    assert torch.equal(logits(offloaded, token_ids), logits(plain, token_ids))


class Contrary(routing.RoutingStrategy):
    """The experts that the router likes least."""

    def choose(self, call):
        return Choice((-call.scores).topk(call.top_k).indices)


def test_a_strategy_of_ones_own_is_known_by_its_name(plain, token_ids):
    routing.register_strategy("contrary", exist_ok=True)(Contrary)
    own = chosen(plain, token_ids)
    with routing.set_routing(plain, "contrary"):
        experts = chosen(plain, token_ids)
    assert not (experts[0][:, :, None] == own[0][:, None, :]).any()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda call: Choice(torch.zeros(1, 2, dtype=torch.int64)), r"chose experts \(1, 2\) of torch.int64 for 18"),
        (
            lambda call: Choice(torch.zeros(call.num_tokens, 2)),
            r"of torch.float32 for 18 tokens; a choice is \(18, K\)",
        ),
        (
            lambda call: Choice(torch.zeros(call.num_tokens, 1, dtype=torch.int64), torch.ones(1)),
            r"and keeps \(1,\) of torch.float32",
        ),
    ],
)
def test_what_is_no_choice_is_refused(plain, token_ids, answer, message):
    class Wrong(routing.RoutingStrategy):
        def choose(self, call):
            return answer(call)

    with routing.set_routing(plain, Wrong()), pytest.raises(MoeOffloadError, match=message):
        logits(plain, token_ids)


def test_the_decoder_alone_follows_a_strategy_as_well(plain, token_ids):
    with torch.no_grad():
        own = plain.model(input_ids=token_ids).last_hidden_state
        routing.set_routing(plain, "hash")
        assert not torch.equal(plain.model(input_ids=token_ids).last_hidden_state, own)


def test_routing_one_tower_by_token_ids_leaves_the_other_out():
    model = build("dots3_note")
    text = [site.index for site in find_sites(model) if "vision" not in site.path]
    routing.set_routing(model, "hash", layers=text)
    ids = torch.randint(0, 96, (1, 5))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_a_hook_around_a_router_is_found_wherever_a_copy_took_it(plain):
    routing.set_routing(plain, "random")
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    router_hooks = [h.__self__ for m in wrapped.modules() for h in m._forward_hooks.values() if hasattr(h, "__self__")]
    assert sum(isinstance(hook, RouterHook) for hook in router_hooks) == 2 * NUM_LAYERS
    routing.reset(wrapped)
    assert hooks_of(wrapped) == 0
