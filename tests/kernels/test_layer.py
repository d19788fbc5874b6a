"""One sparse layer by one call: near float64, and the same bits in pieces, on any number of threads."""

import math
from typing import get_args

import pytest
import torch

from transformers_moe_offload.compute.activation import activate
from transformers_moe_offload.config import HqqFormat
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.grouped import Activation, Function
from transformers_moe_offload.kernels.layer import LayerKernel, Workspace, takes
from transformers_moe_offload.kernels.reference import dequantize
from transformers_moe_offload.kernels.stored import Stored

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")

HIDDEN, INTER, EXPERTS = 128, 192, 6
ACTIVATIONS = [
    Activation(function, True, limit=None, slope=1.7 if function == "silu" else 1.0) for function in get_args(Function)
] + [Activation("silu", True, True, limit=0.7, slope=1.702, shift=1.0), Activation("relu2"), Activation("gelu")]
FORMATS = [None, *(HqqFormat(nbits=nbits, group_size=64, optimize=False) for nbits in (8, 4, 3, 2, 1))]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


class Experts:
    """Random experts, and what they compute in float64."""

    def __init__(self, format, activation, dtype, *, has_bias=False, seed=0):
        random = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=random) * scale).to(dtype)

        self.activation, self.dtype, self.format = activation, dtype, format
        wide = 2 * INTER if activation.has_gate else INTER
        shapes = [(wide, HIDDEN), (HIDDEN, INTER)]
        dense = [[draw(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(EXPERTS)]
        self.biases = [[draw(shape[0]) if has_bias else None for shape in shapes] for _ in range(EXPERTS)]
        self.matrices = dense if format is None else [[quantize(one, format, name="m") for one in two] for two in dense]
        self.exact = [
            [one.double() if format is None else dequantize(one, torch.float32).double() for one in two]
            for two in self.matrices
        ]
        stored = [
            Stored(*shape, None if format is None else matrix.packing, dtype, dtype if has_bias else None)
            for shape, matrix in zip(shapes, self.matrices[0], strict=True)
        ]
        self.kinds = [tuple(stored)]

    def kernel(self, present=range(EXPERTS), **options):
        made = LayerKernel(EXPERTS, self.kinds, self.activation, Workspace(), **options)
        for expert in present:
            self.put(made, expert)
        return made

    def put(self, kernel, expert, until=math.inf):
        kernel.put(expert, 0, *self.matrices[expert], self.biases[expert], until)

    def expected(self, hidden, index, weights):
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for token, choices in enumerate(index.tolist()):
            for choice, expert in enumerate(choices):
                if expert < EXPERTS and weights[token, choice]:
                    out[token] += weights[token, choice].double() * self._one(expert, hidden[token].double())
        return out

    def _one(self, expert, row):
        for number, (matrix, bias) in enumerate(zip(self.exact[expert], self.biases[expert], strict=True)):
            row = matrix @ row + (0 if bias is None else bias.double())
            row = row if number else activate(self.activation, row[None])[0]
        return row


def step_of(num_tokens, dtype, choices=3):
    """Inputs of a step; one pair has no weight, and one no expert."""
    random = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=random).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=random)[:choices] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, choices, generator=random)
    weights[0, 0] = 0
    index[-1, -1] = EXPERTS
    return hidden, index, weights


def error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda one: one.function)
def test_dense_experts_are_as_near_to_float64_as_the_dtype_allows(activation, dtype, has_bias, instruction_set):
    experts = Experts(None, activation, dtype, has_bias=has_bias)
    for num_tokens in (1, 3, 8):
        step = step_of(num_tokens, dtype)
        out = torch.full_like(step[0], math.nan)
        assert experts.kernel().step(*step, out, 0.0)
        assert error(out, experts.expected(*step)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rounds", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("format", FORMATS[1:], ids=lambda one: f"{one.nbits} bits")
def test_experts_in_low_bits_are_near_to_their_decoded_weights(format, rounds, instruction_set):
    experts = Experts(format, ACTIVATIONS[0], torch.bfloat16, has_bias=True)
    for num_tokens in (1, 4, 32):
        step = step_of(num_tokens, torch.bfloat16)
        out = torch.empty_like(step[0])
        assert experts.kernel(rounds=rounds).step(*step, out, 0.0)
        assert error(out, experts.expected(*step)) < (0.03 if rounds else TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("rounds", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("format", FORMATS[:3], ids=["dense", "8 bits", "4 bits"])
def test_tokens_may_choose_an_expert_many_times(format, rounds, instruction_set):
    """Up to 512 rows of one expert, more than a kernel takes at once."""
    experts = Experts(format, ACTIVATIONS[0], torch.float32)
    for num_tokens, choices in ((1, 2), (1, 5), (8, 8), (8, 17), (8, 64), (16, 32)):
        hidden = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
        index, weights = torch.ones(num_tokens, choices, dtype=torch.int64), torch.rand(num_tokens, choices)
        out = torch.empty_like(hidden)
        assert experts.kernel(rounds=rounds).step(hidden, index, weights, out, 0.0)
        expected = experts.expected(hidden, index[:, :1], weights.sum(1, keepdim=True))
        assert error(out, expected) < (0.03 if rounds and format else 1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("format", FORMATS[:3], ids=["dense", "8 bits", "4 bits"])
@pytest.mark.parametrize("num_tokens", [1, 5, 32])
def test_in_pieces_and_on_other_threads_the_bits_are_the_same(num_tokens, format, threads):
    experts, step = Experts(format, ACTIVATIONS[0], torch.bfloat16), step_of(num_tokens, torch.bfloat16)
    kernel = experts.kernel(rounds=True)
    whole, pieces = torch.empty_like(step[0]), torch.empty_like(step[0])
    assert kernel.step(*step, whole, 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = kernel.wanted()
        kernel.take_away(wanted[0])
        assert not kernel.step(*step, pieces, 0.0)
        assert kernel.wanted() == wanted
        kernel.some(wanted[1:])
        experts.put(kernel, wanted[0])
        kernel.some(wanted[:1])
        kernel.end()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize(
    ("num_tokens", "choices", "num_experts", "is_taken"),
    [
        (0, 2, 8, False),
        (8, 4, 4, True),
        (9, 4, 4, False),  # more than eight rows for each expert
        (21, 2, 8, True),
        (32, 8, 64, True),
        (33, 8, 64, False),
        (32, 22, 512, False),  # more pairs than the kernel sorts
        (1, 65, 512, False),
    ],
)
def test_up_to_32_tokens_are_taken_while_experts_have_few_rows_each(num_tokens, choices, num_experts, is_taken):
    assert takes(num_tokens, choices, num_experts) is is_taken


def test_experts_are_wanted_in_the_order_of_the_last_token_that_wants_them():
    kernel = Experts(None, ACTIVATIONS[0], torch.float32).kernel([])
    hidden, index = torch.zeros(3, HIDDEN), torch.tensor([[5, 1], [2, 0], [1, 2]])
    weights = torch.ones(3, 2)
    kernel.begin(hidden, index, weights, torch.empty_like(hidden))
    assert kernel.wanted() == [5, 0, 1, 2]
    weights[2, 1] = 0
    assert not kernel.step(hidden, index, weights, torch.empty_like(hidden), 0.0)
    assert kernel.wanted() == [5, 0, 2, 1]


def test_an_expert_is_absent_from_its_time_on_unless_it_was_used_before():
    experts, step = Experts(None, ACTIVATIONS[0], torch.float32), step_of(1, torch.float32)
    kernel = experts.kernel([], sure_for=10.0)
    for expert in range(EXPERTS):
        experts.put(kernel, expert, until=5.0)
    out = torch.empty_like(step[0])
    assert kernel.step(*step, out, 4.0)
    assert kernel.step(*step, out, 13.9)
    assert not kernel.step(*step, out, 23.9)
    for expert in kernel.wanted():
        kernel.keep_until(expert, 30.0)
    assert kernel.step(*step, out, 29.0)


def test_a_step_without_pairs_is_zero():
    experts = Experts(None, ACTIVATIONS[0], torch.bfloat16)
    hidden, index = torch.ones(2, HIDDEN, dtype=torch.bfloat16), torch.full((2, 3), EXPERTS)
    out = torch.full_like(hidden, math.nan)
    assert experts.kernel([]).step(hidden, index, torch.ones(2, 3), out, 0.0)
    assert not out.any()
