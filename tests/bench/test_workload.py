"""A run does what its workload says, its counts are true, and models with few positions have shorter workloads."""

from itertools import pairwise

import pytest
import torch

from transformers_moe_offload.bench.layers import sparse_layers
from transformers_moe_offload.bench.passage import random_passage
from transformers_moe_offload.bench.workload import (
    Protocol,
    Workload,
    max_positions,
    run,
    seconds_per_forward,
    workloads,
)
from transformers_moe_offload.errors import ConfigError

DECODE = Workload(name="decode", prompt_tokens=8, steps=3)
LAYERS, TOP_K = 8, 4


def forwards_of(model, work, passage):
    """The tokens of every forward, and the run."""
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        return seen, run(model, work, passage)
    finally:
        hook.remove()


def test_decoding_follows_the_text(model, passage):
    seen, done = forwards_of(model, DECODE, passage)
    assert torch.equal(torch.cat(seen, dim=1), passage.sequences(1, 8 + 3))
    assert len(done.forward_s) == 3
    assert done.elapsed_s == sum(done.forward_s) > 0


def test_decoding_counts_the_tokens_after_the_prompt_only(model, passage):
    done = run(model, DECODE, passage)
    assert done.asked == done.hits + done.late_hits + done.misses == 3 * LAYERS * TOP_K
    one = model.moe_offload.plan.expert_bytes // model.moe_offload.plan.num_experts
    assert done.needed_bytes == done.disk_bytes == done.misses * one
    assert sum(done.layer_misses) == done.misses


def test_prefill_is_one_forward_of_the_whole_prompt(model, passage):
    seen, done = forwards_of(model, Workload(name="prefill", prompt_tokens=40), passage)
    assert [tokens.shape for tokens in seen] == [(1, 40)]
    assert len(done.forward_s) == 1
    assert LAYERS * TOP_K < done.asked <= LAYERS * 16


def test_a_batch_follows_one_text_for_each_sequence(model, passage):
    seen, _ = forwards_of(model, Workload(name="batch", prompt_tokens=5, steps=2, batch=3), passage)
    assert torch.equal(torch.cat(seen, dim=1), passage.sequences(3, 5 + 2))


@pytest.mark.parametrize("is_text", [True, False])
def test_beams_step_together(model, passage, is_text):
    used = passage if is_text else random_passage(model.config.vocab_size)
    seen, done = forwards_of(model, Workload(name="beam", prompt_tokens=5, steps=3, beams=4), used)
    assert [tokens.shape for tokens in seen[1:]] == [(4, 1)] * 3
    assert len(done.forward_s) == 3


def test_beams_that_have_learned_nothing_do_not_repeat_a_token(model):
    used = random_passage(model.config.vocab_size)
    seen, _ = forwards_of(model, Workload(name="beam", prompt_tokens=5, steps=6, beams=4), used)
    steps = [set(tokens.flatten().tolist()) for tokens in seen[1:]]
    assert all(one.isdisjoint(other) for one, other in pairwise(steps))


def test_the_clock_stands_still_before_each_measured_forward(model, passage):
    for work, times in ((DECODE, 3), (Workload(name="prefill", prompt_tokens=8), 1)):
        calls = []
        run(model, work, passage, before_forward=lambda calls=calls: calls.append(None))
        assert len(calls) == times


def test_a_token_takes_what_its_forwards_take_in_the_median_run(model, passage):
    runs = [run(model, DECODE, passage) for _ in range(3)]
    assert seconds_per_forward(runs) == sorted(one.elapsed_s / 3 for one in runs)[1]


def test_a_plain_model_has_nothing_to_measure():
    with pytest.raises(Exception, match="has no offloaded experts to measure"):
        sparse_layers(torch.nn.Linear(2, 2))


def test_a_model_with_enough_positions_is_measured_in_full():
    works, notes = workloads(Protocol(), max_positions=4096)
    assert [work.name for work in works] == [
        "decode", "prefill 128", "prefill 512", "prefill 2048", "batch 8", "beam 5",
    ]  # fmt: skip
    assert notes == []


def test_prefill_is_shortened_to_the_positions_there_are_and_said_so():
    works, notes = workloads(Protocol(), max_positions=512)
    assert [work.prompt_tokens for work in works if work.is_prefill] == [128, 512]
    assert notes == ["prefill of 2048 tokens: the model has 512 positions, so 512 tokens are measured instead"]


def test_a_model_too_short_to_decode_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"has 32 positions, but decoding is measured over 33"):
        workloads(Protocol(), max_positions=32)


def test_positions_are_read_from_the_config(model):
    assert max_positions(model) == 512
