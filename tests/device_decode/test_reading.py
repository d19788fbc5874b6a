"""Kernels that read experts by address: on a GPU, and everywhere else in Triton's interpreter.

On a GPU the arena is page-locked and the streams are CUDA's, so these find out what no model of streams can: whether a
kernel can read page-locked memory at the host's address, and whether marks are where they have to be.
"""

import importlib.util

import pytest
import torch

from interpreted import DEVICE, IS_INTERPRETED
from stores import stacked_store
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import make_policy

gpu = pytest.mark.gpu
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
WIDTH = 16 if IS_INTERPRETED else 256
"""Of an expert's matrix: on a GPU large enough for a copy to take longer than a launch."""
NUM_STEPS = 8 if IS_INTERPRETED else 1000


@pytest.fixture(scope="module")
def read():
    """What reads all records of a layer; imported in tests only, which decides whether it is interpreted."""
    from .reading import read

    return read


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer}.weight": torch.randn(NUM_EXPERTS, WIDTH, WIDTH, generator=generator) for layer in range(NUM_LAYERS)
    }
    return stacked_store(tmp_path_factory.mktemp("experts"), tensors)


@gpu
@pytest.mark.parametrize("num_slots", [2, 9, 24])
def test_every_step_reads_every_expert_whatever_is_resident(read, store, num_slots):
    arena = Arena(store, range(NUM_LAYERS), DEVICE, workers=2)
    engine = DeviceEngine(arena, dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS), num_slots, make_policy("lru"), DEVICE)
    records = [[arena.record(ExpertId(layer, e)) for e in range(NUM_EXPERTS)] for layer in range(NUM_LAYERS)]
    expected = [torch.stack(of_layer).view(torch.int32).to(DEVICE) for of_layer in records]
    num_words = expected[0].shape[1]
    routing = torch.rand(NUM_STEPS, NUM_LAYERS, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    chosen = (routing * torch.linspace(1, 0.3, NUM_EXPERTS)).topk(TOP_K).indices.to(DEVICE)
    num_wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for step in range(NUM_STEPS):
        for layer in range(NUM_LAYERS):
            engine.note(layer, chosen[step, layer : layer + 1])
            num_wrong += (read(engine.addresses(layer), num_words) != expected[layer]).sum()
        engine.between_steps()
        if step % 4 == 3:  # a prompt
            with engine.cache.turn, engine.cache.visit(step % NUM_LAYERS, range(NUM_EXPERTS)) as visit:
                for expert, weights in visit:
                    found = weights["weight"].view(torch.int32).flatten()
                    num_wrong += (found != expected[step % NUM_LAYERS][expert][: len(found)]).sum()
    stats = engine.stats
    assert num_wrong == 0
    assert all(layer.asked >= NUM_STEPS * TOP_K for layer in stats.values())
    assert num_slots < 9 or sum(layer.hits for layer in stats.values()) >= NUM_STEPS
    engine.close()
