"""Hidden costs of a step of decoding: memory that stays, and waits for the device."""

import gc
import tracemalloc
from collections import Counter
from typing import ClassVar

import pytest
import torch

from transformers_moe_offload.compute import token_grouping
from transformers_moe_offload.compute.forward import sparse_forward

from .layers import EXPERTS, MLP, E, Layer, inputs

WAITS = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "unique", "to"}
"""What makes the host wait until a device has got so far, and then brings something down from it."""


class OnDevice(torch.Tensor):
    """A tensor that notes when the host asks for its content, as if it lay on a device."""

    waits: ClassVar = Counter()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in WAITS and not (func.__name__ == "to" and "cpu" not in map(str, args[1:])):
            cls.waits[func.__name__] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def layer(tmp_path):
    return Layer(tmp_path, torch.float32)


@pytest.mark.parametrize("num_slots", [2, E])
@pytest.mark.parametrize("num_tokens", [1, 8, 100])
def test_a_layer_waits_for_the_device_once(layer, num_tokens, num_slots, monkeypatch):
    """For a token, a small batch and a prompt; experts in waves or all resident."""
    monkeypatch.setattr(token_grouping, "_is_on_host", lambda tensor: not isinstance(tensor, OnDevice))
    cache = layer.cache(num_slots)
    hidden, index, weights = inputs(num_tokens, 2, torch.float32)
    expected = sparse_forward(cache, 0, MLP, EXPERTS, hidden, index, weights)
    on_device = [tensor.as_subclass(OnDevice) for tensor in (hidden, index, weights)]
    OnDevice.waits.clear()
    with torch.inference_mode():
        out = sparse_forward(cache, 0, MLP, EXPERTS, *on_device)
    assert OnDevice.waits == {"tolist": 1}
    assert torch.equal(out.as_subclass(torch.Tensor), expected)


def test_a_tensor_that_is_looked_at_is_noticed():
    tensor = torch.ones(2).as_subclass(OnDevice)
    OnDevice.waits.clear()
    tensor.to("cpu"), tensor.sum().item(), bool(tensor[0] > 0), tensor.to(torch.float64)
    assert sorted(OnDevice.waits) == ["__bool__", "item", "to"]
    assert OnDevice.waits["to"] == 1


@pytest.mark.parametrize("num_slots", [3, E])
def test_steps_keep_no_memory(layer, num_slots):
    """Hits only, and with misses in every step."""
    cache = layer.cache(num_slots)
    steps = [inputs(1, 2, torch.float32, seed) for seed in range(20)]

    def run(times):
        with torch.inference_mode():
            for number in range(times):
                sparse_forward(cache, 0, MLP, EXPERTS, *steps[number % len(steps)])

    def tensors():
        gc.collect()
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    run(200)
    tensors_before = tensors()
    tracemalloc.start()
    try:
        run(1000)  # what torch keeps of its own accord is there by then
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        run(1000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 16_000, "16 bytes a step are less than any object"
    assert tensors() <= tensors_before
