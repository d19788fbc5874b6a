"""A model with few positions is measured over fewer tokens, and the report says so."""

import pytest

from transformers_moe_offload.bench.protocol import Protocol, max_positions, workloads
from transformers_moe_offload.errors import ConfigError


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
