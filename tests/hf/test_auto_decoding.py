"""`decode="auto"` takes the way that is faster by what was measured, says both figures, and changes no token.

Tests marked `gpu` run on a GPU where there is one, and interpreted by `test_interpreted.py`.
"""

import importlib.util
import logging

import pytest
import torch

from interpreted import DEVICE
from transformers_moe_offload import ExpertFormats, HqqFormat
from transformers_moe_offload.device_decode.cost_model import DecodeRates
from transformers_moe_offload.hf.decode import costs
from transformers_moe_offload.hybrid.split import MissRates

from .decoding import generate, load, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

HOST_US, READ_US, FETCH_US, SLOW_COMPUTE_US = 400, 900, 600, 100_000


@pytest.fixture
def measured(monkeypatch):
    """Sets what measuring finds, in microseconds; the layers that were measured, by name."""
    layers = []

    def given(*, host=HOST_US, read=READ_US, fetch=FETCH_US, compute=SLOW_COMPUTE_US):
        misses = MissRates(fetch_s=fetch / 1e6, expert_s=compute / 1e6, row_s=0.0, trip_s=0.0)
        rates = DecodeRates(misses, resident_s=50e-6, read_s=read / 1e6, host_s=host / 1e6, submit_s=20e-6)

        def rates_of(model, layer, sources, pool, config):
            layers.append(layer.name)
            return rates

        monkeypatch.setattr(costs, "rates_of", rates_of)
        return layers

    return given


def is_on_device(model):
    """Whether all sparse layers are, or none is."""
    runtime = model.moe_offload
    found = {layer.index in runtime.decoding._layers for layer in runtime.layers}
    assert len(found) == 1
    assert found == {bool(runtime.decoding.engines)} == {runtime.plan.arena_bytes > 0}
    return found.pop()


def test_the_same_rates_choose_by_how_many_experts_are_resident(small_checkpoint, measured, caplog):
    """With all of them the device saves the host's 400 us. To read an absent one in place takes 1200 us longer than to
    move it, and one or two of the two that are wanted are absent."""
    caplog.set_level(logging.INFO, "transformers_moe_offload")
    ways = []
    for budget in ("13%", "50%", "100%"):
        measured(read=2 * READ_US)
        caplog.clear()
        model = load(small_checkpoint, "auto", budget, device=DEVICE)
        ways.append(is_on_device(model))
        assert ("decode='auto' has no effect: from the host it takes" in caplog.text) is not ways[-1]
        theirs, _ = generate(load(small_checkpoint, "device" if ways[-1] else "host", budget, device=DEVICE), prompt())
        tokens, _ = generate(model, prompt())
        assert torch.equal(tokens, theirs)
    assert ways == [False, False, True]


def test_both_figures_are_said_and_all_that_they_come_from(small_checkpoint, measured, caplog):
    caplog.set_level(logging.INFO, "transformers_moe_offload")
    measured()
    load(small_checkpoint, "auto", "100%", device=DEVICE)
    assert (
        f"{DEVICE}: a sparse layer decodes in 500 us from the host and in 100 us on the device, by measured rates; an "
        "absent expert is moved in 600 us, read in place in 900 us and computed by the host in 100000 us"
    ) in caplog.text


def test_tokens_are_equal_whichever_way_is_taken(small_checkpoint, measured):
    found = []
    for host in (0, 10 * READ_US):
        measured(host=host)
        model = load(small_checkpoint, "auto", "50%", device=DEVICE)
        found.append((is_on_device(model), generate(model, prompt())[0]))
    assert [way for way, _ in found] == [False, True]
    assert torch.equal(found[0][1], found[1][1])


def test_a_host_that_may_compute_misses_is_reckoned_with(small_checkpoint, measured):
    ways = {}
    for misses in ("fetch", "compute"):
        measured(host=READ_US, compute=1)
        ways[misses] = is_on_device(load(small_checkpoint, "auto", "13%", device=DEVICE, misses=misses))
    assert ways == {"fetch": True, "compute": False}


def test_the_layer_that_is_measured_is_one_that_can_decode_on_the_device(packable_checkpoint, measured):
    four, eight = HqqFormat(nbits=4, group_size=16), HqqFormat(nbits=8, group_size=16)
    layers = measured()
    formats = ExpertFormats(default=four, hot=eight, hot_experts={"0": [1]})
    load(packable_checkpoint, "auto", experts=formats, device=DEVICE).moe_offload.close()
    assert layers == ["model.layers.1.mlp.experts"]


def test_too_little_host_memory_leaves_nothing_to_measure(small_checkpoint, measured, caplog):
    caplog.set_level(logging.INFO, "transformers_moe_offload")
    layers = measured(host=10 * READ_US)
    assert not is_on_device(load(small_checkpoint, "auto", device=DEVICE, host_budget="1KiB"))
    assert layers == []
    assert "host_budget='1KiB' allows 1,024" in caplog.text


def test_what_is_measured_on_this_machine_decides_without_being_given(small_checkpoint, caplog):
    caplog.set_level(logging.INFO, "transformers_moe_offload")
    model = load(small_checkpoint, "auto", "50%", device=DEVICE)
    assert ("decode='auto' has no effect" in caplog.text) is not is_on_device(model)
    assert caplog.text.count("by measured rates") == 1
    assert torch.equal(generate(model, prompt())[0], generate(load(small_checkpoint, device=DEVICE), prompt())[0])
