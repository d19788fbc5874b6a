"""A layer's experts are shared between its cache and the host, and the outcome is that of the layer."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from compute.layers import MLP, E, Layer, inputs
from transformers_moe_offload.compute.forward import sparse_forward
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hybrid.cpu_experts import HostCompute, HostSide
from transformers_moe_offload.hybrid.split import MissRates

SLOW_LINK = MissRates(fetch_s=1.0, expert_s=0.0, row_s=0.0, trip_s=0.0)
EVEN = MissRates(fetch_s=1.0, expert_s=1.0, row_s=0.0, trip_s=0.0)
SLOW_HOST = MissRates(fetch_s=0.0, expert_s=1.0, row_s=0.0, trip_s=0.0)


class Experts(nn.Module):
    act_fn = staticmethod(torch.tanh)


EXPERTS = Experts().eval()


@pytest.fixture
def host():
    computer = HostCompute()
    yield computer
    computer.close()


def side_of(host, layer, rates, at_hand=range(E)):
    @contextmanager
    def hold(expert):
        yield layer.store.layers[expert.layer].read(expert.expert)

    return HostSide(host, rates, lambda expert: expert.expert in at_hand, hold)


def forward(side, cache, hidden, index, weights, experts=EXPERTS):
    """The layer, its absent experts shared out; returns its output and how many experts the host computed."""
    before = cache.stats[0].computed
    out = sparse_forward(cache, 0, MLP, experts, hidden, index, weights, host=side)
    return out, cache.stats[0].computed - before


@pytest.mark.parametrize("num_slots", [1, 3, E])
@pytest.mark.parametrize("rates", [SLOW_LINK, EVEN, SLOW_HOST])
def test_wherever_experts_are_computed_the_outcome_is_the_layers(host, tmp_path, rates, num_slots):
    layer = Layer(tmp_path, torch.float32)
    cache, side = layer.cache(num_slots), side_of(host, layer, rates)
    for seed in range(6):
        hidden, index, weights = inputs(1 + seed % 3, 3, torch.float32, seed)
        found, _ = forward(side, cache, hidden, index, weights)
        assert torch.equal(found, layer.by_autograd(hidden, index, weights))


@pytest.mark.parametrize(("rates", "num_computed"), [(SLOW_LINK, 3), (EVEN, 1), (SLOW_HOST, 0)])
def test_the_rates_decide_how_many_the_host_takes(host, tmp_path, rates, num_computed):
    layer = Layer(tmp_path, torch.float32)
    side = side_of(host, layer, rates)
    _, computed = forward(side, layer.cache(4), *inputs(1, 3, torch.float32))
    assert computed == num_computed


def test_residents_and_experts_on_disk_are_not_the_hosts(host, tmp_path):
    layer = Layer(tmp_path, torch.float32)
    cache = layer.cache(E)
    hidden, index, weights = inputs(2, 3, torch.float32)
    wanted = sorted(set(index.flatten().tolist()))
    with cache.turn, cache.visit(0, wanted[:1]) as visit:
        visit.take(wanted[0])
    on_disk = wanted[-1]
    side = side_of(host, layer, SLOW_LINK, at_hand=set(range(E)) - {on_disk})
    _, computed = forward(side, cache, hidden, index, weights)
    assert computed == len(set(wanted) - {wanted[0], on_disk})
    assert not cache.is_absent(ExpertId(0, on_disk))
    assert all(cache.is_absent(ExpertId(0, expert)) for expert in wanted[1:-1])


def test_an_expert_that_the_host_computes_counts_as_a_miss_and_is_heard_of(host, tmp_path):
    layer = Layer(tmp_path, torch.float32)
    cache, heard = layer.cache(2), []
    cache.on_visit = lambda _, wanted: heard.append(wanted)
    hidden, index, weights = inputs(1, 3, torch.float32)
    forward(side_of(host, layer, SLOW_LINK), cache, hidden, index, weights)
    assert cache.stats[0].misses == cache.stats[0].computed == 3
    assert cache.stats[0].disk_bytes == 0
    assert sorted(heard[0]) == sorted(index.flatten().tolist())


def test_training_and_autocast_leave_the_host_out(host, tmp_path):
    layer = Layer(tmp_path, torch.float32)
    side = side_of(host, layer, SLOW_LINK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, computed = forward(side, layer.cache(E), *inputs(1, 3, torch.float32))
    assert computed == 0
    _, computed = forward(side, layer.cache(E), *inputs(1, 3, torch.float32), experts=Experts().train())
    assert computed == 0
