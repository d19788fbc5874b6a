"""A layer's experts are shared between its cache and the host, and the outcome is that of the layer."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from transformers_moe_offload.cache.misses import MissRates
from transformers_moe_offload.compute.forward import combine
from transformers_moe_offload.compute.host import HostCompute
from transformers_moe_offload.compute.host_side import HostSide
from transformers_moe_offload.compute.routing import group_by_expert

from .layers import MLP, E, Layer, inputs

SLOW_LINK = MissRates(fetch_s=1.0, expert_s=0.0, row_s=0.0, trip_s=0.0)
EVEN = MissRates(fetch_s=1.0, expert_s=1.0, row_s=0.0, trip_s=0.0)
SLOW_HOST = MissRates(fetch_s=0.0, expert_s=1.0, row_s=0.0, trip_s=0.0)


class Experts(nn.Module):
    act_fn = staticmethod(torch.tanh)


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


def forward(side, cache, hidden, index, weights):
    """The layer, its absent experts shared out; returns its output and what the host computed."""
    grouping = group_by_expert(index, weights, E)
    share = side.share(cache, 0, grouping)
    rows = side.start(MLP, Experts(), hidden, 0, share)
    outputs = {}
    with cache.visit(0, [expert for expert in grouping.by_last_use if expert not in share]) as visit:
        for expert, found in visit:
            outputs[expert] = MLP(Experts(), hidden[grouping.tokens[expert]], found)
        outputs |= rows.finish()
    return combine([outputs[expert] for expert in grouping.experts], grouping, hidden, weights), set(share)


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
    assert len(computed) == num_computed


def test_residents_and_experts_on_disk_are_not_the_hosts(host, tmp_path):
    layer = Layer(tmp_path, torch.float32)
    cache = layer.cache(E)
    hidden, index, weights = inputs(2, 3, torch.float32)
    wanted = sorted(set(index.flatten().tolist()))
    with cache.visit(0, wanted[:1]) as visit:
        visit.take(wanted[0])
    on_disk = wanted[-1]
    side = side_of(host, layer, SLOW_LINK, at_hand=set(range(E)) - {on_disk})
    _, computed = forward(side, cache, hidden, index, weights)
    assert computed == set(wanted) - {wanted[0], on_disk}
