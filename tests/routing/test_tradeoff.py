"""The meter of cache-aware routing: what it measures, and what it makes of that."""

# N predicted tokens

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import ConfigError, MoeOffloadError, OffloadConfig, cache_stats, routing
from transformers_moe_offload.routing.calibration import token_losses
from transformers_moe_offload.routing.meter.figures import Interval, figures_of
from transformers_moe_offload.routing.meter.steps import Steps
from transformers_moe_offload.routing.meter.windows import windows_of


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 96, (61,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(checkpoint):
    config = OffloadConfig(cache_budget="40%", arithmetic="exact", mmap=False)
    return AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)


def measure(model, text, strengths=(0.2, 0.6), **options):
    return routing.tradeoff(model, [text], strengths, **{"window": 20} | options)


def test_the_loss_at_strength_zero_is_that_of_the_plain_model_in_one_forward(plain, model, text):
    found = measure(model, text)
    expected = torch.cat([token_losses(plain, window[None])[0] for window in text.split(20) if len(window) > 1])
    assert found.num_tokens == len(expected) == 57
    assert found.figures[0].strength == 0
    assert found.figures[0].nats.value == pytest.approx(float(expected.double().mean()), abs=1e-5)
    assert found.figures[0].loss == Interval(0, 0, 0)
    assert found.figures[0].agreement == Interval(1, 1, 1)


def test_larger_strengths_load_less_and_say_other_things(model, text):
    own, some, much = measure(model, text).figures
    assert (own.strength, some.strength, much.strength) == (0, 0.2, 0.6)
    assert own.hit_rate.value < some.hit_rate.value < much.hit_rate.value
    assert 1 == own.misses.value > some.misses.value > much.misses.value
    assert own.bytes_per_token.value > some.bytes_per_token.value > much.bytes_per_token.value
    assert own.kl.value == 0 < some.kl.value < much.kl.value
    assert much.agreement.value <= some.agreement.value <= 1
    for one in (own, some, much):
        for interval in (one.hit_rate, one.nats, one.tokens_per_s):
            assert interval.low <= interval.value <= interval.high
        assert one.loss.value == pytest.approx(math.expm1(one.nats.value - own.nats.value))


def test_every_strength_starts_from_an_empty_cache_so_a_measurement_repeats(model, text):
    first, again = measure(model, text), measure(model, text, strengths=(0.6,))
    assert again.figures[1].nats == first.figures[2].nats
    assert again.figures[1].misses == first.figures[2].misses
    assert again.figures[0].hit_rate == first.figures[0].hit_rate


def test_the_model_is_as_it_was_and_its_strategies_are_back(model, text):
    routing.set_routing(model, "top_k", k=1)
    model.train()
    measure(model, text, strengths=(0.2,), tokens=19)
    assert model.training
    assert cache_stats(model).follows_cache is None
    with routing.record_routing(model) as recorder, torch.no_grad():
        model.eval()(text[None, :4])
    assert next(iter(recorder.trace.rows(0))).experts.shape == (4, 1)


def test_a_measurement_that_is_broken_off_goes_on_where_it_was(model, text, tmp_path):
    expected, path, calls = measure(model, text), tmp_path / "kept", []

    def stop():
        calls.append(1)
        if len(calls) == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, text, resume=path, before_step=stop)
    with path.open("a") as file:
        file.write('{"window": 1, "stren')  # the process was killed while it wrote
    calls.clear()
    done = []
    found = measure(model, text, resume=path, before_step=lambda: calls.append(1), progress=lambda *at: done.append(at))
    assert [one.nats for one in found.figures] == [one.nats for one in expected.figures]
    assert [one.misses for one in found.figures] == [one.misses for one in expected.figures]
    assert len(calls) < 3 * 57 - 40
    assert done[-1] == (3 * 57, 3 * 57)
    calls.clear()
    again = measure(model, text, resume=path, before_step=lambda: calls.append(1))
    assert (again.figures, calls) == (found.figures, [])
    more = measure(model, text, strengths=(0.2, 0.4, 0.6), resume=path)
    assert [one.strength for one in more.figures] == [0, 0.2, 0.4, 0.6]
    assert more.figures[1].nats == found.figures[1].nats


def test_what_was_kept_of_another_measurement_is_refused(model, text, tmp_path):
    path = tmp_path / "kept"
    measure(model, text, tokens=19, resume=path)
    with pytest.raises(ConfigError, match="is of another measurement: its protect is 1, and now it is 0"):
        measure(model, text, tokens=19, resume=path, protect=0)
    with pytest.raises(ConfigError, match="is of another measurement: its texts is"):
        measure(model, text.flip(0), tokens=19, resume=path)
    for content, message in (
        ("no json", "is not valid JSON"),
        ("[]\n", "is not a file that a measurement was kept in"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            measure(model, text, resume=path)
    measure(model, text, tokens=19, resume=tmp_path / "other")
    with (tmp_path / "other").open("a") as file:
        file.write('{"window": 0}\n')
    with pytest.raises(ConfigError, match=r"line 5 of .* holds no steps of a window"):
        measure(model, text, tokens=19, resume=tmp_path / "other")


def made(nats, hits, seconds):
    """Steps of a window with three experts a token."""
    ones = np.ones(len(nats))
    return Steps(np.array(nats), 0.1 * ones, ones, seconds * ones, 3 * ones, np.array(hits), 100 * (3 - np.array(hits)))


def tradeoff_of(steps, max_loss=0.01, protect=1):
    num_tokens = sum(len(one.nats) for one in steps[0])
    config = OffloadConfig(cache_budget="25%", cache_aware=0.7)
    return routing.Tradeoff(tuple(figures_of(steps)), num_tokens, max_loss, config, protect)


def test_figures_are_those_of_the_tokens_and_intervals_those_of_their_blocks():
    random = np.random.default_rng(0)
    nats, hits = random.normal(2, 1, 640), random.integers(0, 4, 640).astype(float)
    steps = {0: [made(nats, hits, 0.2)], 0.5: [made(nats + 0.01, np.minimum(hits + 1, 3), 0.1)]}
    own, ours = figures_of(steps)
    assert own.nats.value == pytest.approx(nats.mean())
    assert 0.02 < own.nats.high - own.nats.low < 0.3
    assert ours.loss == pytest.approx((math.expm1(0.01),) * 3), "the difference is the same in every block"
    assert ours.speed == pytest.approx((2, 2, 2))
    assert ours.tokens_per_s.value == pytest.approx(10)
    assert own.bytes_per_token.value == pytest.approx(100 * (3 - hits.mean()))
    assert ours.misses.value == pytest.approx((3 - np.minimum(hits + 1, 3)).sum() / (3 - hits).sum())


def test_blocks_do_not_reach_over_windows_and_few_tokens_are_blocks_of_one():
    own = figures_of({0: [made([1.0, 2.0], [0.0, 0.0], 1), made([3.0], [0.0], 1)]})[0]
    assert (own.nats.value, own.nats.low, own.nats.high) == (2, 1, 3)


def test_the_largest_strength_within_the_loss_is_recommended_with_the_line_for_it():
    hits = np.zeros(40)
    steps = {s: [made(np.full(40, 2 + gain), hits, 1)] for s, gain in ((0, 0), (0.1, 0.004), (0.2, 0.009), (0.4, 0.02))}
    found = tradeoff_of(steps)
    assert found.recommended.strength == 0.2
    assert found.line == "OffloadConfig(cache_budget='25%', cache_aware=0.2)"
    assert eval(found.line).cache_aware.strength == 0.2
    assert tradeoff_of(steps, max_loss=0.05, protect=2).line.endswith("cache_aware={'strength': 0.4, 'protect': 2})")
    none = tradeoff_of(steps, max_loss=0.001)
    assert (none.recommended.strength, none.line) == (0, "OffloadConfig(cache_budget='25%')")
    assert json.loads(json.dumps(none.to_dict()))["figures"][1]["loss"][0] == pytest.approx(math.expm1(0.004))


def test_windows_are_spread_over_the_texts_and_predict_as_many_tokens_as_asked_for():
    texts = [torch.arange(1000), torch.arange(5000, 5300)]
    windows = windows_of(texts, 100, 400)
    assert sum(len(one) - 1 for one in windows) == 400
    assert [int(one[0]) for one in windows] == [0, 300, 600, 5000, 5100]
    assert [len(one) for one in windows_of([torch.arange(30)], 100, 400)] == [30]
    assert [len(one) for one in windows_of([torch.arange(21)], 10, 400)] == [10, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": [-0.1]}, "strength=-0.1 of cache_aware is not a number from 0"),
        ({"strengths": [50]}, "strength=50 of cache_aware is not a number from 0"),
        ({"strengths": []}, "strengths names none to measure"),
        ({"max_loss": -1}, "max_loss=-1 is not a number of at least 0"),
        ({"tokens": 0}, "tokens=0 is not an integer of at least 1"),
        ({"window": 1}, "window=1 is not an integer of at least 2"),
        ({"texts": []}, "there is no text to measure with"),
        ({"texts": [[]]}, "text 0 has 0 tokens, and nothing to predict in fewer than 2"),
        ({"texts": [[1, 2], [3]]}, "text 1 has 1 token, and nothing to predict"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, text, options, message):
    with pytest.raises(ConfigError, match=message):
        routing.tradeoff(model, **{"texts": [text]} | options)


def test_a_model_without_a_cache_is_refused(plain, text):
    with pytest.raises(MoeOffloadError, match="is not offloaded; load it with moe_offload="):
        routing.tradeoff(plain, [text])


def test_a_cache_that_is_cleared_is_empty_and_works_as_a_new_one(model, checkpoint, text):
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        expected = fresh(text[None, :5]).logits
        model(text[None])
        model.moe_offload.clear()
        model.moe_offload.reset_stats()
        assert torch.equal(model(text[None, :5]).logits, expected)
    assert cache_stats(model).misses == cache_stats(fresh).misses
