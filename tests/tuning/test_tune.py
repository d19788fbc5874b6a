"""`tune` predicts settings, runs the best three, and recommends the fastest of them."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import CapacityError, ConfigError, HqqFormat, OffloadConfig, UnsupportedModelError
from transformers_moe_offload.routing.meter import Interval
from transformers_moe_offload.tracing import Trace, TraceError
from transformers_moe_offload.tuning import Candidate, Measured, Setting, Tuned, tune
from transformers_moe_offload.tuning.limits import expect_on_cpu, is_past_cache_faster
from transformers_moe_offload.tuning.other_programs import OtherPrograms
from transformers_moe_offload.tuning.prediction import Prediction
from transformers_moe_offload.tuning.reading import record
from transformers_moe_offload.tuning.settings import line_of

FEW = {"tokens": 40, "window": 21, "policies": ["lru", "lfu"], "predictors": ["last_token"]}


@pytest.fixture
def ram(load):
    """Half of what all experts take."""
    model = load(OffloadConfig(cache_budget="50%", mmap=False, direct_io=True))
    nbytes = model.moe_offload.plan.cache_bytes
    model.moe_offload.close()
    load.configs.clear()
    return nbytes


def test_what_is_recommended_is_the_fastest_of_the_three_that_were_run(load, text, ram):
    found = tune(load, [text], ram=ram, formats=[HqqFormat(nbits=4, group_size=16)], max_loss=1e9, **FEW)
    assert len(found.checked) == 3
    assert all(len(one.measured.runs) == 3 for one in found.checked)
    assert found.best in found.checked
    assert found.best.measured_tokens_per_s == max(one.measured_tokens_per_s for one in found.checked)
    assert found.line == line_of(found.best.setting.config)
    assert found.is_within == (abs(found.best.error) <= 0.15)
    assert found.tokens == 39, "a window of 21 and one of 20"
    speeds = [one.ranked.tokens_per_s for one in found.candidates]
    assert speeds == sorted(speeds, reverse=True)
    assert eval(found.line, {"OffloadConfig": OffloadConfig, "HqqFormat": HqqFormat}) == found.best.setting.config


def test_every_dimension_is_compared_and_everything_stays_within_the_ram(load, text, ram):
    found = tune(load, [text], ram=ram, formats=[HqqFormat(nbits=4, group_size=16)], strengths=[0, 0.4], **FEW)
    settings = [one.setting for one in found.candidates]
    assert {one.config.policy for one in settings} == {"lru", "lfu"}
    assert {one.prefetch for one in settings} == {"none", "last_token"}
    assert {one.format for one in settings} == {"as stored", "4x16"}
    assert {one.strength for one in settings} == {0, 0.4}
    assert len({one.num_slots for one in found.candidates if one.setting.format == "as stored"}) == 3
    assert all((one.loss is None) == (one.format == "as stored" and not one.strength) for one in settings)
    for config in load.configs:
        assert config.experts is not None or (config.mmap is False and config.budget.nbytes <= ram)
        assert config.experts is not None or config.direct_io in (True, False), "read as it was measured"


def test_without_a_loss_only_what_keeps_results_is_run(load, text, ram):
    formats = [HqqFormat(nbits=4, group_size=16)]
    found = tune(load, [text], ram=ram, formats=formats, strengths=[0.4], max_loss=0, **FEW)
    assert all(one.setting.loss is None for one in found.checked)
    assert any(one.setting.loss is not None for one in found.candidates)


def test_one_setting_that_keeps_results_is_run_whatever_is_faster(load, text, ram):
    formats = [HqqFormat(nbits=bits, group_size=16) for bits in (4, 3, 2)]
    found = tune(load, [text], ram=ram, formats=formats, strengths=[], max_loss=1e9, **FEW)
    assert any(one.setting.loss is None for one in found.checked)


def test_a_trace_ranks_settings_and_leaves_out_what_changes_results(load, text, ram):
    model = load(OffloadConfig(cache_budget="50%", mmap=False))
    (trace,) = record(model, [text.flip(0)], lambda: None).traces
    found = tune(load, [text], ram=ram, trace=trace, **FEW | {"predictors": ["last_token", "next_router"]})
    assert all(one.setting.loss is None for one in found.candidates)
    assert all(one.ranked.steps == 40 for one in found.candidates)
    assert any(one.ranked.misses != one.predicted.misses for one in found.candidates), "the text is another one"
    assert any(note.startswith("next_router is left out") for note in found.notes)
    assert any("a trace has neither text nor scores" in note for note in found.notes)


def test_with_room_for_all_experts_there_is_one_setting_of_those_that_keep_results(load, text):
    found = tune(load, [text], ram="64MiB", formats=[], strengths=[0.1], **FEW | {"policies": None})
    most = max(one.num_slots for one in found.candidates)
    assert [one.setting.config.policy for one in found.candidates if one.num_slots == most] == ["lru"]


def test_a_format_that_does_not_fit_is_left_out_with_the_reason(load, text, ram):
    formats = [HqqFormat(nbits=8, group_size=16), HqqFormat(nbits=2, group_size=128)]
    found = tune(load, [text], ram=ram // 2, formats=formats, strengths=[], **FEW)
    assert any(note.startswith("8x16 is left out: experts take") for note in found.notes)
    assert any(note.startswith("2x128 is left out:") and "does not divide" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ram": "much"}, "ram='much' is not a budget"),
        ({"ram": "40%"}, "ram='40%' is not a size; write bytes as an int, or a size such as '8GiB'"),
        ({"ram": "auto"}, "ram='auto' is not a size"),
        ({"ram": -1}, "ram=-1 is not a positive number of bytes"),
        ({"ram": "9000TiB"}, "and this machine has"),
        ({"strengths": [-0.1]}, "strength=-0.1 of cache_aware is not a number from 0"),
        ({"strengths": [9]}, "strength=9 of cache_aware is not a number from 0"),
        ({"max_loss": -1}, "max_loss=-1 is not a number of at least 0"),
        ({"tokens": 0}, "tokens=0 is not an integer of at least 1"),
        ({"window": 1}, "window=1 is not an integer of at least 2"),
        ({"policies": ["lur"]}, "policy='lur' is not a known policy"),
        ({"predictors": ["oracle"]}, "predictor='oracle' is not one of"),
        ({"arithmetic": "slow"}, "arithmetic='slow' is not one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(load, text, options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        tune(load, [text], **{"ram": "1MiB"} | options)
    assert load.configs == []


def test_too_little_ram_names_the_least_that_works(load, text):
    with pytest.raises(CapacityError, match="a cache budget of 1,000 bytes is too small: one slot for an expert takes"):
        tune(load, [text], ram=1000)


@pytest.mark.parametrize(("texts", "message"), [([], "there is no text"), ([[5]], "text 0 has 1 token, and nothing")])
def test_without_a_text_of_two_tokens_there_is_nothing_to_run(load, texts, message):
    with pytest.raises(ConfigError, match=message):
        tune(load, texts, ram="1MiB")


def test_a_trace_of_another_model_or_of_prompts_is_refused(load, text, ram):
    model = load(OffloadConfig(cache_budget="50%", mmap=False))
    (trace,) = record(model, [text], lambda: None).traces
    fewer = replace(trace, num_experts=(4,) * trace.num_layers, visits=[])
    with pytest.raises(TraceError, match=r"recorded with \d sparse layers of 4 experts, and Qwen3MoeForCausalLM has"):
        tune(load, [text], ram=ram, trace=fewer)
    with pytest.raises(TraceError, match="recorded with another model, whose first sparse layer is layers"):
        tune(
            load,
            [text],
            ram=ram,
            trace=replace(trace, layer_names=tuple(f"layers.{i}" for i in range(trace.num_layers))),
        )
    with pytest.raises(TraceError, match="has no step of one token"):
        tune(load, [text], ram=ram, trace=Trace(trace.layer_names, trace.num_experts))


def test_a_model_that_is_not_offloaded_is_refused(checkpoint, text):
    with pytest.raises(Exception, match="is not offloaded"):
        tune(lambda config: AutoModelForCausalLM.from_pretrained(checkpoint), [text], ram="1MiB")


def test_experts_on_another_device_are_refused(load):
    plan = load(OffloadConfig(cache_budget="50%", mmap=False)).moe_offload.plan
    expect_on_cpu(plan)
    pools = tuple(replace(pool, device=torch.device("cuda:1")) for pool in plan.pools)
    with pytest.raises(UnsupportedModelError, match="experts are computed on cuda:1, and what is timed are experts in"):
        expect_on_cpu(replace(plan, pools=pools))


def test_a_prediction_that_was_off_is_called_so():
    def candidate(predicted, measured=None, other_cores=0.1):
        setting = Setting(config=OffloadConfig(), loss=Interval(0.01, 0, 0.02))
        prediction = Prediction(steps=100, seconds=100 / predicted, asked=10, hits=5, misses=5)
        speed = measured and Measured(measured, (measured,) * 3, other_cores)
        return Candidate(setting=setting, num_slots=3, ranked=prediction, predicted=prediction, measured=speed)

    near, far, fast = candidate(11, 10), candidate(12, 10), candidate(99)
    found = Tuned(candidates=(fast, near), ram_bytes=1, max_loss=0.1, tokens=100, notes=())
    assert (found.best, found.is_within, found.best.error) == (near, True, pytest.approx(0.1))
    found = replace(found, candidates=(fast, far))
    assert (found.best, found.is_within, found.best.error) == (far, False, pytest.approx(0.2))
    assert found.to_dict()["is_within_15_percent"] is False
    assert found.disturbed_by == 0
    assert replace(found, other_cores=0.7).disturbed_by == 0.7
    assert replace(found, candidates=(candidate(11, 10, 0.9),)).disturbed_by == 0.9


def test_what_holds_up_one_step_of_one_run_does_not_count():
    found = Measured.of([[1.0, 2.0, 3.0], [1.0, 2.0, 30.0], [9.0, 2.0, 3.0]], other_cores=0.5)
    assert found == (3 / 6, (3 / 6, 3 / 33, 3 / 14), 0.5)


def test_other_programs_are_noticed():
    others = OtherPrograms()
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1)
        assert others.cores() > 0.3
    finally:
        spinning.kill()
        spinning.wait()


def test_our_own_work_is_none_of_other_programs():
    others, began = OtherPrograms(), time.monotonic()
    own = time.process_time()
    while time.monotonic() < began + 0.5:
        pass
    own = time.process_time() - own
    assert 0 <= others.cores() <= os.cpu_count() - own / 0.5 + 0.2


def test_which_way_of_reading_is_faster_is_tried_with_nothing_cached(load):
    assert is_past_cache_faster(load(OffloadConfig(cache_budget="50%", mmap=False))) in (True, False)
    quantized = load(OffloadConfig(experts=HqqFormat(nbits=4, group_size=16)))
    assert is_past_cache_faster(quantized) is False
