import pytest
import torch
from torch.nn import functional

from compute.layers import EXPERTS, MLP, E, H, Layer, inputs
from transformers_moe_offload.compute.forward import sparse_forward
from transformers_moe_offload.compute.recompute import recompute_in_backward


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return {dtype: Layer(tmp_path_factory.mktemp("layer"), dtype) for dtype in dtypes}


class Offloaded:
    """The layer as `hf` calls it, over a cache of so many slots."""

    def __init__(self, layer, num_slots):
        self.cache = layer.cache(num_slots)

    def __call__(self, hidden, index, weights, experts=EXPERTS):
        def compute(keeps_weights):
            return lambda *xs: sparse_forward(self.cache, 0, MLP, experts, *xs, keeps_weights=keeps_weights)

        return recompute_in_backward(compute(False), compute(True), hidden, index, weights)


def gradients(layer, hidden, index, weights, experts=EXPERTS):
    """The output of a layer and the gradients of a weighted sum of it."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = layer(hidden, index, weights, experts)
    weighted_sum(out).backward()
    return out.detach(), hidden.grad, weights.grad


def weighted_sum(out):
    return (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_slots", [1, 2, E])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_gradients_equal_those_of_plain_autograd_bit_for_bit(layers, num_tokens, num_slots, dtype):
    """Whatever is resident: so gradients must not be summed in the order in which experts arrive."""
    arguments = inputs(num_tokens, 3, dtype)
    expected = gradients(layers[dtype].by_autograd, *arguments)
    offloaded = Offloaded(layers[dtype], num_slots)
    for _ in range(3):
        got = gradients(offloaded, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_are_those_of_finite_differences(layers):
    offloaded = Offloaded(layers[torch.float64], 1)
    hidden, index, weights = inputs(3, 2, torch.float64)
    torch.autograd.gradcheck(lambda h, w: offloaded(h, index, w), (hidden.requires_grad_(), weights.requires_grad_()))


def test_slots_overwritten_between_forward_and_backward_corrupt_no_gradient(layers):
    offloaded = Offloaded(layers[torch.float64], 1)
    hidden, index, weights = inputs(4, 3, torch.float64)
    _, expected, _ = gradients(layers[torch.float64].by_autograd, hidden, index, weights)
    hidden.requires_grad_()
    out = offloaded(hidden, index, weights)
    for seed in range(3):
        offloaded(*inputs(4, 3, torch.float64, seed))
    weighted_sum(out).backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_a_routing_weight_of_zero_has_the_gradient_it_would_have(layers):
    hidden, index, weights = inputs(6, 3, torch.float64)
    weights[:, 1] = 0
    _, _, expected = gradients(layers[torch.float64].by_autograd, hidden, index, weights)
    _, _, got = gradients(Offloaded(layers[torch.float64], 1), hidden, index, weights)
    torch.testing.assert_close(got, expected)
    assert got[:, 1].abs().min() > 0


def test_only_inputs_that_need_gradients_get_them(layers):
    hidden, index, weights = inputs(4, 2, torch.float32)
    weights.requires_grad_()
    Offloaded(layers[torch.float32], 1)(hidden, index, weights).sum().backward()
    assert weights.grad is not None
    assert hidden.grad is None


def test_a_layer_in_which_every_pair_is_idle_passes_no_gradient_and_no_error(layers):
    """As with plain experts under a residual connection: the loss does not depend on the experts at all."""
    hidden, index, weights = inputs(4, 2, torch.float32)
    hidden.requires_grad_()
    out = hidden + Offloaded(layers[torch.float32], 1)(hidden, torch.full_like(index, E), weights)
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def test_a_second_derivative_is_refused_and_not_silently_wrong(layers):
    hidden, index, weights = inputs(2, 2, torch.float64)
    hidden.requires_grad_()
    out = Offloaded(layers[torch.float64], 1)(hidden, index, weights)
    (grad,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class DroppingOut:
    """Experts with dropout inside."""

    training = True

    @staticmethod
    def act_fn(x):
        return functional.dropout(torch.tanh(x), 0.5)


@pytest.mark.parametrize("num_slots", [1, E])
@pytest.mark.parametrize("draws_between", [0, 3])
def test_dropout_inside_an_expert_drops_the_same_in_the_backward_pass(layers, num_slots, draws_between):
    """Against plain autograd over the very numbers that the forward pass drew: experts arrive in another order then."""
    hidden, index, weights = inputs(20, 1, torch.float64)
    hidden.requires_grad_()
    torch.manual_seed(1)
    out = Offloaded(layers[torch.float64], num_slots)(hidden, index, weights, DroppingOut)
    torch.rand(draws_between)
    weighted_sum(out).backward()
    torch.manual_seed(1)
    expected_out, expected, _ = gradients(
        layers[torch.float64].by_autograd, hidden.detach(), index, weights, DroppingOut
    )
    torch.testing.assert_close(out.detach(), expected_out)
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.parametrize("num_slots", [1, 2, E])
def test_dropout_drops_the_same_at_every_cache_size_and_whatever_is_resident(layers, num_slots):
    """Experts draw from one stream of random numbers, so the order of arrival must not decide who draws which."""
    layer, arguments = layers[torch.float64], inputs(20, 2, torch.float64)
    torch.manual_seed(1)
    expected = layer.by_autograd(*arguments, DroppingOut)
    offloaded = Offloaded(layer, num_slots)
    for seed in range(3):
        offloaded(*inputs(1, 2, torch.float64, seed))  # others are resident each time
        torch.manual_seed(1)
        torch.testing.assert_close(offloaded(*arguments, DroppingOut), expected)


def test_the_backward_pass_leaves_the_random_numbers_to_come_as_they_were(layers):
    hidden, index, weights = inputs(20, 1, torch.float32)
    out = Offloaded(layers[torch.float32], 1)(hidden.requires_grad_(), index, weights, DroppingOut)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_pass_computes_under_the_autocast_of_the_forward_pass(layers):
    """Trainer's `bf16=True`: float32 activations, bfloat16 experts, and a backward pass outside of the block."""
    hidden, index, weights = inputs(5, 2, torch.float32)

    def gradient(layer):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(leaf, index, weights)
        weighted_sum(out).backward()
        return leaf.grad

    layer = layers[torch.bfloat16]
    assert torch.equal(gradient(Offloaded(layer, 2)), gradient(layer.by_autograd))


def test_a_model_that_generated_before_can_be_trained(layers):
    """Slots and their views may have been made in inference mode, whose tensors autograd refuses."""
    offloaded, arguments = Offloaded(layers[torch.float64], E), inputs(4, 2, torch.float64)
    with torch.inference_mode():
        offloaded(*arguments)
    _, got, _ = gradients(offloaded, *arguments)
    _, expected, _ = gradients(layers[torch.float64].by_autograd, *arguments)
    torch.testing.assert_close(got, expected)


def test_nothing_is_remembered_without_a_gradient(layers):
    hidden, index, weights = inputs(4, 2, torch.float32)
    out = Offloaded(layers[torch.float32], 1)(hidden, index, weights)
    assert out.grad_fn is None
    assert out.shape == (4, H)
