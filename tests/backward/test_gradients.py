"""Gradients through a layer's experts, both ways: on our own tape, and through a forward that is not ours."""

import pytest
import torch
from torch.nn import functional

from compute.layers import EXPERTS, MLP, E, H, Layer, inputs
from transformers_moe_offload.backward.differentiable_forward import adapted_forward
from transformers_moe_offload.backward.saved_tensors import Lending
from transformers_moe_offload.compute.deltas import NOTHING
from transformers_moe_offload.compute.forward import combine
from transformers_moe_offload.compute.token_grouping import group_by_expert


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return {dtype: Layer(tmp_path_factory.mktemp("layer"), dtype) for dtype in dtypes}


class Taped:
    """The layer as `hf` calls it where the arithmetic is ours, over a cache of so many slots."""

    def __init__(self, layer, num_slots):
        self.cache = layer.cache(num_slots)
        self.borrowed = []

    def used(self, experts):
        pass

    def borrow(self, expert, use):
        self.borrowed.append(expert)
        with self.cache.turn, self.cache.visit(0, [expert]) as visit:
            return use(visit.take(expert))

    def __call__(self, hidden, index, weights, experts=EXPERTS):
        return adapted_forward(self.cache, 0, MLP, experts, hidden, index, weights, adaptation=NOTHING, lender=self)


class Lent:
    """The layer as `hf` calls it where the arithmetic is its own, over a cache of so many slots."""

    def __init__(self, layer, num_slots):
        self.cache = layer.cache(num_slots)
        self.borrowed = []

    def again(self, name, expert):
        self.borrowed.append((name, expert))
        with self.cache.turn, self.cache.visit(0, [expert]) as visit:
            return visit.take(expert)[name].clone()

    def __call__(self, hidden, index, weights, experts=EXPERTS):
        grouping = group_by_expert(index, weights, E, keep_zero_weights=True)
        with self.cache.turn, self.cache.visit(0, grouping.experts) as visit:
            lending = Lending(lambda name, expert: visit.take(expert)[name], self.again)
            with lending.recorded():
                outputs = [
                    MLP(experts, hidden[tokens], {name: lending(name, expert) for name in ("up_proj", "down_proj")})
                    for expert, tokens in grouping.tokens.items()
                ]
                lending.end()
                return combine(outputs, grouping, hidden, weights)


@pytest.fixture(params=[Taped, Lent])
def Offloaded(request):  # noqa: N802 - it is a class
    return request.param


def gradients(layer, hidden, index, weights, experts=EXPERTS):
    """The output of a layer and the gradients of a weighted sum of it."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    out = layer(hidden, index, weights, experts)
    weighted_sum(out).backward()
    return out.detach(), hidden.grad, weights.grad


def weighted_sum(out):
    return (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


@pytest.mark.parametrize("num_slots", [1, 2, E])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_gradients_equal_those_of_plain_autograd_bit_for_bit(layers, Offloaded, num_tokens, num_slots):  # noqa: N803
    """Whatever is resident: so gradients must not be summed in the order in which experts arrive."""
    arguments = inputs(num_tokens, 3, torch.float32)
    expected = gradients(layers[torch.float32].by_autograd, *arguments)
    offloaded = Offloaded(layers[torch.float32], num_slots)
    for _ in range(3):
        got = gradients(offloaded, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_bfloat16_gradients_are_as_good_as_plain_autograds_and_the_same_everywhere(layers, Offloaded, num_tokens):  # noqa: N803
    """Not bit for bit: where processors lack bfloat16, products are added up in float32."""
    arguments = inputs(num_tokens, 3, torch.bfloat16)
    wide = [it.double() if it.is_floating_point() else it for it in arguments]
    twin = object.__new__(Layer)
    twin.up, twin.down = layers[torch.bfloat16].up.double(), layers[torch.bfloat16].down.double()
    exact = gradients(twin.by_autograd, *wide)
    plain = gradients(layers[torch.bfloat16].by_autograd, *arguments)
    first = gradients(Offloaded(layers[torch.bfloat16], 1), *arguments)
    for ours, theirs, reference in zip(first, plain, exact, strict=True):
        assert (ours - reference).square().mean() <= 1.1 * (theirs - reference).square().mean()
    for num_slots in (2, E):
        again = gradients(Offloaded(layers[torch.bfloat16], num_slots), *arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_are_those_of_finite_differences(layers, Offloaded):  # noqa: N803
    offloaded = Offloaded(layers[torch.float64], 1)
    hidden, index, weights = inputs(3, 2, torch.float64)
    torch.autograd.gradcheck(lambda h, w: offloaded(h, index, w), (hidden.requires_grad_(), weights.requires_grad_()))


def test_slots_overwritten_between_forward_and_backward_corrupt_no_gradient(layers, Offloaded):  # noqa: N803
    offloaded = Offloaded(layers[torch.float64], 1)
    hidden, index, weights = inputs(4, 3, torch.float64)
    _, expected, _ = gradients(layers[torch.float64].by_autograd, hidden, index, weights)
    hidden.requires_grad_()
    out = offloaded(hidden, index, weights)
    for seed in range(3):
        offloaded(*inputs(4, 3, torch.float64, seed))
    weighted_sum(out).backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_a_routing_weight_of_zero_has_the_gradient_it_would_have(layers, Offloaded):  # noqa: N803
    hidden, index, weights = inputs(6, 3, torch.float64)
    weights[:, 1] = 0
    _, _, expected = gradients(layers[torch.float64].by_autograd, hidden, index, weights)
    _, _, got = gradients(Offloaded(layers[torch.float64], 1), hidden, index, weights)
    torch.testing.assert_close(got, expected)
    assert got[:, 1].abs().min() > 0


def test_only_inputs_that_need_gradients_get_them(layers, Offloaded):  # noqa: N803
    hidden, index, weights = inputs(4, 2, torch.float32)
    weights.requires_grad_()
    Offloaded(layers[torch.float32], 1)(hidden, index, weights).sum().backward()
    assert weights.grad is not None
    assert hidden.grad is None


def test_a_layer_in_which_every_pair_is_idle_passes_no_gradient_and_no_error(layers, Offloaded):  # noqa: N803
    """As with plain experts under a residual connection: the loss does not depend on the experts at all."""
    hidden, index, weights = inputs(4, 2, torch.float32)
    hidden.requires_grad_()
    out = hidden + Offloaded(layers[torch.float32], 1)(hidden, torch.full_like(index, E), weights)
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def test_a_second_derivative_of_the_tape_is_refused_and_not_silently_wrong(layers):
    hidden, index, weights = inputs(2, 2, torch.float64)
    hidden.requires_grad_()
    out = Taped(layers[torch.float64], 1)(hidden, index, weights)
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
def test_dropout_inside_an_expert_drops_the_same_in_the_backward_pass(layers, Offloaded, num_slots, draws_between):  # noqa: N803
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
def test_dropout_drops_the_same_at_every_cache_size_and_whatever_is_resident(layers, Offloaded, num_slots):  # noqa: N803
    """Experts draw from one stream of random numbers, so the order of arrival must not decide which draws which."""
    layer, arguments = layers[torch.float64], inputs(20, 2, torch.float64)
    torch.manual_seed(1)
    expected = layer.by_autograd(*arguments, DroppingOut)
    offloaded = Offloaded(layer, num_slots)
    for seed in range(3):
        offloaded(*inputs(1, 2, torch.float64, seed))  # others are resident each time
        torch.manual_seed(1)
        torch.testing.assert_close(offloaded(*arguments, DroppingOut), expected)


def test_the_backward_pass_leaves_the_random_numbers_to_come_as_they_were(layers, Offloaded):  # noqa: N803
    hidden, index, weights = inputs(20, 1, torch.float32)
    out = Offloaded(layers[torch.float32], 1)(hidden.requires_grad_(), index, weights, DroppingOut)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_pass_computes_under_the_autocast_of_the_forward_pass(layers, Offloaded):  # noqa: N803
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


def test_a_model_that_generated_before_can_be_trained(layers, Offloaded):  # noqa: N803
    """Slots and their views may have been made in inference mode, whose tensors autograd refuses."""
    offloaded, arguments = Offloaded(layers[torch.float64], E), inputs(4, 2, torch.float64)
    with torch.inference_mode():
        offloaded(*arguments)
    _, got, _ = gradients(offloaded, *arguments)
    _, expected, _ = gradients(layers[torch.float64].by_autograd, *arguments)
    torch.testing.assert_close(got, expected)


def test_nothing_is_remembered_without_a_gradient(layers, Offloaded):  # noqa: N803
    hidden, index, weights = inputs(4, 2, torch.float32)
    out = Offloaded(layers[torch.float32], 1)(hidden, index, weights)
    assert out.grad_fn is None
    assert out.shape == (4, H)


def test_autograd_keeps_no_weight(layers):
    """Of what it saves for the backward pass, nothing has the size of a weight, nor lies where one does."""
    offloaded = Taped(layers[torch.float64], 2)
    hidden, index, weights = inputs(7, 3, torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda it: it):
        offloaded(hidden.requires_grad_(), index, weights.requires_grad_())
    weight = H * layers[torch.float64].up.shape[1] * 8
    assert saved
    assert all(tensor.nbytes < weight and tensor.untyped_storage().nbytes() < E * weight for tensor in saved)


@pytest.mark.parametrize("autocast", [False, True])
def test_every_weight_that_a_forward_of_another_kind_multiplied_with_is_had_again(layers, autocast):
    """Also under autocast, which multiplies with casts of the weights."""
    offloaded = Lent(layers[torch.float32], 2)
    hidden, index, weights = inputs(7, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = offloaded(hidden.requires_grad_(), index, weights)
    out.float().sum().backward()
    wanted = index.unique(sorted=True).tolist()
    assert offloaded.borrowed == [(name, expert) for expert in reversed(wanted) for name in ("down_proj", "up_proj")]


def test_an_expert_is_borrowed_for_each_of_its_products_in_the_reverse_order(layers):
    offloaded = Taped(layers[torch.float64], 2)
    hidden, index, weights = inputs(7, 3, torch.float64)
    gradients(offloaded, hidden, index, weights)
    wanted = index.unique(sorted=True).tolist()
    assert offloaded.borrowed == [expert for expert in reversed(wanted) for _ in range(2)]


def test_a_failed_backward_pass_leaves_no_slot_held_and_the_next_one_works(layers, Offloaded):  # noqa: N803
    offloaded = Offloaded(layers[torch.float64], 1)
    hidden, index, weights = inputs(4, 3, torch.float64)
    read, fails = offloaded.cache.slots.start, [False]

    def start(expert, slot, alongside):
        if fails[0]:
            raise OSError("gone")
        return read(expert, slot, alongside)

    offloaded.cache.slots.start = start
    out = offloaded(hidden.clone().requires_grad_(), index, weights)
    fails[0] = True
    with pytest.raises(OSError, match="gone"):
        weighted_sum(out).backward()
    fails[0] = False
    assert offloaded.cache.turn.acquire(blocking=False)
    offloaded.cache.turn.release()
    _, expected, _ = gradients(layers[torch.float64].by_autograd, hidden, index, weights)
    _, got, _ = gradients(offloaded, hidden, index, weights)
    torch.testing.assert_close(got, expected)
