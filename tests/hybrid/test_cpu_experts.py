"""What the host computes beside an accelerator is what the layer would have computed itself."""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from compute.layers import MLP, E, Layer, inputs
from transformers_moe_offload.compute.forward import combine
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.hybrid.cpu_experts import HostCompute, is_portable


class Experts(nn.Module):
    """An experts module without tensors of its own."""

    act_fn = staticmethod(torch.tanh)


@pytest.fixture
def host():
    computer = HostCompute()
    yield computer
    computer.close()


class Shelf:
    """A layer's experts in host memory; counts which are open, and which have been."""

    def __init__(self, layer):
        self._layer = layer
        self.opened, self.is_open = [], set()

    @contextmanager
    def hold(self, expert):
        self.opened.append(expert)
        self.is_open.add(expert)
        yield {"up_proj": self._layer.up[expert], "down_proj": self._layer.down[expert]}
        self.is_open.remove(expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_a_layer_that_is_shared_with_the_host_computes_the_same_bits(host, tmp_path, dtype, num_tokens):
    layer = Layer(tmp_path, dtype)
    hidden, index, weights = inputs(num_tokens, 3, dtype)
    grouping = group_by_expert(index, weights, E)
    shelf = Shelf(layer)
    for num_computed in range(len(grouping.experts) + 1):
        computed = {expert: grouping.tokens[expert] for expert in grouping.experts[:num_computed]}
        rows = host.start(MLP, Experts(), hidden, computed, shelf.hold)
        outputs = {
            expert: MLP(Experts(), hidden[tokens], {"up_proj": layer.up[expert], "down_proj": layer.down[expert]})
            for expert, tokens in grouping.tokens.items()
            if expert not in computed
        }
        outputs |= rows.finish()
        found = combine([outputs[expert] for expert in grouping.experts], grouping, hidden, weights)
        assert torch.equal(found, layer.by_autograd(hidden, index, weights))


def test_each_expert_is_open_while_it_is_computed_and_only_once(host, tmp_path):
    shelf = Shelf(Layer(tmp_path, torch.float32))
    seen = []

    class Watching(Experts):
        def act_fn(self, rows):
            seen.append(set(shelf.is_open))
            return torch.tanh(rows)

    host.start(MLP, Watching(), torch.ones(2, 16), {5: [0], 2: [0, 1]}, shelf.hold).finish()
    assert shelf.opened == [5, 2]
    assert seen == [{5}, {2}]
    assert shelf.is_open == set()


def test_the_caller_goes_on_while_the_host_computes(host, tmp_path):
    may_go_on = threading.Event()

    @contextmanager
    def late(expert):
        assert may_go_on.wait(10)
        yield {"up_proj": torch.ones(24, 16), "down_proj": torch.ones(16, 24)}

    rows = host.start(MLP, Experts(), torch.ones(1, 16), {0: [0]}, late)
    assert not rows._work.done()
    may_go_on.set()
    assert rows.finish()[0].shape == (1, 16)
    assert rows._work.done()


def test_an_expert_that_cannot_be_opened_is_an_error_of_the_layer_and_of_no_other(host, tmp_path):
    shelf = Shelf(Layer(tmp_path, torch.float32))

    @contextmanager
    def torn(expert):
        raise OSError("the disk is gone")
        yield

    with pytest.raises(OSError, match="the disk is gone"):
        host.start(MLP, Experts(), torch.ones(1, 16), {0: [0]}, torn).finish()
    assert set(host.start(MLP, Experts(), torch.ones(1, 16), {0: [0]}, shelf.hold).finish()) == {0}


def test_nobody_to_compute_is_no_work(host):
    assert host.start(MLP, Experts(), torch.ones(1, 16), {}, None).finish() == {}


def test_inference_tensors_are_computed_with_and_no_graph_is_kept(host, tmp_path):
    shelf = Shelf(Layer(tmp_path, torch.float32))
    with torch.inference_mode():
        rows = host.start(MLP, Experts(), torch.ones(1, 16), {0: [0]}, shelf.hold).finish()[0]
    leaf = torch.ones(1, 16, requires_grad=True)
    again = host.start(MLP, Experts(), leaf, {0: [0]}, shelf.hold).finish()[0]
    assert not again.requires_grad
    assert torch.equal(rows, again)


def test_experts_that_need_what_is_on_the_device_stay_there():
    with_activation = Experts()
    with_activation.act_fn = nn.PReLU()
    assert is_portable(MLP, Experts())
    assert not is_portable(MLP, with_activation)
    assert not is_portable(ExpertMlp(has_post_expert_norm=True), Experts())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_rows_of_a_gpu_come_back_to_it(host, tmp_path, num_tokens):
    layer = Layer(tmp_path, torch.bfloat16)
    hidden, index, weights = inputs(num_tokens, 3, torch.bfloat16)
    tokens = group_by_expert(index, weights, E).tokens
    for _ in range(20):
        rows = host.start(MLP, Experts(), hidden.cuda() + 0, tokens, Shelf(layer).hold).finish()
        expected = host.start(MLP, Experts(), hidden, tokens, Shelf(layer).hold).finish()
        for expert in tokens:
            assert rows[expert].is_cuda
            assert torch.equal(rows[expert].cpu(), expected[expert])
