"""Many tokens at once: every wanted expert crosses once, and what the last tokens want is there afterwards."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.bench.layers import experts_of
from transformers_moe_offload.expert import ExpertId

from .conftest import TINY_MOE


def load(budget, **options):
    config = OffloadConfig(cache_budget=budget, mmap=False, **options)
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)


def tokens(rows, columns, seed=0):
    return torch.randint(3, 4000, (rows, columns), generator=torch.Generator().manual_seed(seed))


class Routers:
    """What the routers choose, seen where it reaches the experts: {layer: [(T, K) of each forward]}."""

    def __init__(self, model):
        self.chosen = {layer.index: [] for layer in model.moe_offload.layers}
        for layer in model.moe_offload.layers:
            module = model.get_submodule(layer.name)
            module.register_forward_pre_hook(lambda _, inputs, seen=self.chosen[layer.index]: seen.append(inputs[1]))

    def num_wanted(self):
        """Experts that any token wanted, counted once for each layer and forward."""
        return sum(len(choices.unique()) for forwards in self.chosen.values() for choices in forwards)


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_a_batch_of_eight_moves_each_wanted_expert_once(num_tokens, arithmetic):
    """With one slot for all layers no expert is a hit by luck."""
    smallest = load("10%").moe_offload.plan.smallest_budget
    model = AutoModelForCausalLM.from_pretrained(
        TINY_MOE, moe_offload=OffloadConfig(cache_budget=smallest, arithmetic=arithmetic, mmap=False)
    )
    routers = Routers(model)
    with torch.no_grad():
        model(tokens(8, num_tokens))
    stats, (pool,) = model.moe_offload.stats(), model.moe_offload.plan.pools
    assert pool.num_slots == 1
    assert stats.hits + stats.late_hits == 0
    assert stats.misses == stats.asked == routers.num_wanted()
    assert stats.disk_bytes == stats.misses * pool.need.slot_bytes


@pytest.mark.parametrize("policy", ["lru", "slru", "sieve", "least_stale"])
def test_after_a_prompt_the_experts_of_its_last_token_are_resident(policy):
    model = load("50%", policy=policy)
    routers = Routers(model)
    with torch.no_grad():
        model(tokens(1, 200))
    caches = {layer.index: experts_of(module).cache for module, layer in model.moe_offload.modules()}
    for layer, (choices,) in routers.chosen.items():
        assert len(choices.unique()) > model.moe_offload.plan.num_slots / 8, "more than there are slots for a layer"
        residency = caches[layer].residency
        assert all(residency.is_resident(ExpertId(layer, expert)) for expert in choices[-1].tolist())


def test_a_long_prompt_loads_nobody_again_whom_decoding_has_just_used_and_its_last_token_wants():
    model = load("50%")
    prompt = tokens(1, 120)
    with torch.no_grad():
        model(prompt[:, -1:])
        model(prompt)
        routers = Routers(model)
        model.moe_offload.reset_stats()
        model(prompt)
    stats = model.moe_offload.stats()
    slots_per_layer = model.moe_offload.plan.num_slots // 8
    kept = 8 * (slots_per_layer - 2)  # of the last ones wanted; two slots for the others to pass through
    assert stats.hits >= kept
    assert stats.hits + stats.misses == routers.num_wanted()


def test_tokens_decoded_after_a_prompt_are_those_of_a_cache_that_holds_everything():
    prompt, options = (
        tokens(1, 150),
        {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2},
    )
    assert torch.equal(load("30%").generate(prompt, **options), load("100%").generate(prompt, **options))
