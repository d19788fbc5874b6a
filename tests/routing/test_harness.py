"""lm-evaluation-harness, where it is installed: ordered by reuse it answers the same, and the cache serves more."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_moe_offload import OffloadConfig, cache_stats

from .test_order import EXAMPLES, TINY_MOE

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MOE)


@pytest.fixture(scope="module")
def words(tokenizer):
    """A few words from each text of prose and code in turns."""
    lines = [(EXAMPLES / "evaluation" / f"{d}.jsonl").read_text().splitlines()[:12] for d in ("prose", "python")]
    return [" ".join(json.loads(line)["text"].split()[:5]) for pair in zip(*lines, strict=True) for line in pair]


def asked(lm, kind, arguments):
    """The answers to requests, and how many experts were resident when they were asked for."""
    lm.model.moe_offload.reset_stats()
    answers = getattr(lm, kind)([SimpleNamespace(args=one) for one in arguments], disable_tqdm=True)
    return answers, cache_stats(lm.model).hits


@pytest.fixture
def harnesses(tokenizer):
    """The harness's own class and ours, each with a model of its own."""
    from lm_eval.models.huggingface import HFLM

    from transformers_moe_offload.routing.harness import ReuseOrderedLM

    def harnesses(**options):
        config = OffloadConfig(cache_budget="40%", mmap=False)
        return [
            kind(AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config), tokenizer=tokenizer, **options)
            for kind in (HFLM, ReuseOrderedLM)
        ]

    return harnesses


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_requests_that_are_run_one_by_one_have_the_harness_s_answers_bit_for_bit(kind, harnesses, words):
    arguments = [(text,) for text in words]
    if kind == "loglikelihood":  # several continuations of one token share a forward
        arguments = [(text, word) for text in words for word in (" the", " a", " self.name")]
    own, ours = harnesses(batch_size=1)
    expected, hits = asked(own, kind, arguments)
    found, more_hits = asked(ours, kind, arguments)
    assert found == expected
    assert more_hits > hits


@pytest.mark.parametrize("batch_size", [5, "auto"])
def test_in_batches_they_are_equal_to_rounding(batch_size, harnesses, words):
    arguments = [(text, word) for text in words for word in (" the", " self.name")]
    own, ours = harnesses(batch_size=batch_size, max_batch_size=8, max_length=64)
    expected, _ = asked(own, "loglikelihood", arguments)
    found, _ = asked(ours, "loglikelihood", arguments)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=0.02)
    assert sum(a != b for (_, a), (_, b) in zip(found, expected, strict=True)) <= 1


def test_nothing_asked_is_nothing_answered(harnesses):
    _, ours = harnesses()
    assert asked(ours, "loglikelihood", [])[0] == []
    assert asked(ours, "loglikelihood_rolling", [])[0] == []
