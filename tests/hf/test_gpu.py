"""A whole model on a CUDA device: the same promises as on a CPU. Nothing here runs without one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload import HqqFormat, OffloadConfig

from .conftest import TINY_MOE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["def main(argv):\n", "#include <", "The"]


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE, padding_side="left")
    return tokenizer(PROMPTS, return_tensors="pt", padding=True).to("cuda")


def load(budget="100%", arithmetic="exact", **options):
    config = OffloadConfig(cache_budget=budget, arithmetic=arithmetic)
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config, **options)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_without_a_device_map_everything_goes_to_the_gpu():
    model = load()
    assert model.device.type == "cuda"
    assert {pool.device.type for pool in model.moe_offload.plan.pools} == {"cuda"}


@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
@pytest.mark.parametrize("pin_memory", [True, False])
def test_logits_are_the_same_at_every_cache_size(arithmetic, pin_memory, batch):
    smallest = load().moe_offload.plan.smallest_budget
    expected = logits(load(arithmetic=arithmetic), batch)
    for budget in (smallest, "10%", "50%"):
        config = OffloadConfig(cache_budget=budget, arithmetic=arithmetic, pin_memory=pin_memory)
        model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
        for _ in range(3):  # again with other experts resident
            assert torch.equal(logits(model, batch), expected), budget
        assert model.moe_offload.stats().device_bytes > 0


def test_logits_are_close_to_the_plain_models(batch):
    plain = AutoModelForCausalLM.from_pretrained(TINY_MOE, device_map="cuda", experts_implementation="eager")
    torch.testing.assert_close(logits(load("25%"), batch), logits(plain, batch), rtol=2e-2, atol=2e-2)


def test_moving_a_model_from_the_cpu_takes_its_slots_along(batch):
    model = load("25%", device_map="cpu")
    model.to("cuda")
    assert torch.equal(logits(model, batch), logits(load("25%"), batch))
    assert {pool.device.type for pool in model.moe_offload.plan.pools} == {"cuda"}


def test_slots_take_no_more_memory_than_the_budget():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load("25%")
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    slack = 4 << 20  # the allocator rounds every tensor up to 512 bytes
    assert torch.cuda.memory_allocated() - before <= dense + model.moe_offload.plan.cache_bytes + slack


def test_gradients_are_the_same_at_every_cache_size(batch):
    grads = []
    for budget in ("15%", "100%"):
        model = load(budget)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-4)


def test_the_host_computes_misses_and_logits_stay_close(batch):
    expected = logits(load("10%", arithmetic="fast"), batch)
    config = OffloadConfig(cache_budget="10%", misses="compute")
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
    with torch.no_grad():
        model.generate(**batch, max_new_tokens=8, do_sample=False)
    torch.testing.assert_close(logits(model, batch), expected, rtol=2e-2, atol=2e-2)
    assert model.moe_offload.stats().computed > 0


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_quantized_experts_give_the_same_logits_at_every_cache_size(nbits, batch):
    format = HqqFormat(nbits=nbits, group_size=32)
    seen = [
        logits(
            AutoModelForCausalLM.from_pretrained(
                TINY_MOE, moe_offload=OffloadConfig(cache_budget=budget, experts=format)
            ),
            batch,
        )
        for budget in ("10%", "50%", "100%")
    ]
    assert all(torch.equal(other, seen[0]) for other in seen)
