"""Training with the experts of rollouts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recorded import kl, routes_apart
from transformers_moe_offload import ConfigError, OffloadConfig, routing, training
from transformers_moe_offload.routing.router_hook import RouterHook
from transformers_moe_offload.tracing import TraceError

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
PROMPTS = ["def read(path):", "The committee met on", "int main("]


@pytest.fixture(scope="module")
def batch():
    return AutoTokenizer.from_pretrained(TINY_MOE)(PROMPTS * 2, return_tensors="pt", padding=True, padding_side="left")


@pytest.fixture
def model():
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(cache_budget="50%"))
    training.set_trainable(model, "router")
    return model


def rollouts(model, batch, seed=0):
    torch.manual_seed(seed)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, do_sample=True, **options)


def trained(model, batch, written):
    """A step on what was written: the recording of its forward, and logits of the tokens that were sampled."""
    width = batch["input_ids"].shape[1]
    mask = torch.ones_like(written.sequences)
    mask[:, :width] = batch["attention_mask"]
    with routing.record_routing(model, scores=None) as recorder:
        outputs = model(written.sequences, attention_mask=mask, labels=written.sequences)
    outputs.loss.backward()
    return recorder.trace, outputs.logits[:, width - 1 : -1].detach()


def test_training_routes_as_the_rollout_did_and_predicts_closer_to_it(model, batch):
    with routing.record_routing(model, scores=None) as recorder:
        written = rollouts(model, batch)
    sampled = torch.stack(written.logits, 1)
    own_trace, own_logits = trained(model, batch, written)
    with routing.RolloutReplay(model) as replay:
        assert torch.equal(rollouts(model, batch).sequences, written.sequences)
        trace, logits = trained(model, batch, written)
    assert routes_apart(recorder.trace, own_trace).routes > 0, "rounding changed no route: nothing to replay"
    assert routes_apart(replay.trace, trace).routes == 0
    assert routes_apart(recorder.trace, trace) == (routes_apart(recorder.trace, own_trace).tokens, 0)
    assert kl(sampled, logits) < kl(sampled, own_logits)
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    assert len(gradients) == 8
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_each_rollout_takes_the_place_of_the_one_before_and_routes_by_itself(model, batch):
    with routing.RolloutReplay(model) as replay:
        first = rollouts(model, batch)
        before = replay.trace
        second = rollouts(model, batch, seed=1)
        assert replay.trace is not before
        trained(model, batch, second)
        with pytest.raises(TraceError, match="no route of token"):
            trained(model, batch, first)
    assert torch.equal(rollouts(model, batch, seed=1).sequences, second.sequences)


def test_rollouts_follow_a_strategy_that_is_set_and_nothing_stays_behind(model, batch):
    with routing.set_routing(model, "top_k", k=2):
        with routing.RolloutReplay(model, layers=[0, 1]) as replay:
            rollouts(model, batch)
            assert [facts.router for facts in replay.trace.routers] == [0, 1]
            assert replay.trace.routed_experts(0).shape[1:] == (2, 2)
        with routing.record_routing(model) as recorder, torch.no_grad():
            model(batch["input_ids"])
        assert recorder.trace.routed_experts(0).shape[2] == 2
    assert "generate" not in vars(model)
    assert not any(
        isinstance(getattr(hook, "__self__", None), RouterHook)
        for m in model.modules()
        for hook in m._forward_hooks.values()
    )


def test_two_replays_of_one_model_are_refused(model):
    with routing.RolloutReplay(model), pytest.raises(ConfigError, match="generate is replaced already"):
        routing.RolloutReplay(model).start()
