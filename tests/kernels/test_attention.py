"""Attention of the newest tokens: near float64, and the same bits on any number of threads."""

import pytest
import torch

from transformers_moe_offload.config import HqqFormat
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.attention import Attention, AttentionKernel
from transformers_moe_offload.kernels.few_rows import Norm
from transformers_moe_offload.kernels.reference import dequantize

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")

HIDDEN = 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
FORMATS = [None, *(HqqFormat(nbits=nbits, group_size=32, optimize=False) for nbits in (8, 4, 3, 2))]


class Layer:
    """Random weights, and what attention with them is in float64."""

    def __init__(self, dtype, *, heads=4, kv_heads=2, head_dim=16, rotary_dim=None, format=None, has_bias=False,
                 norm=None, norm_cols=None):  # fmt: skip
        random = torch.Generator().manual_seed(heads * head_dim + kv_heads)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=random) * scale).to(dtype)

        self.dtype, self.head_dim, self.norm, self.draw = dtype, head_dim, norm, draw
        self.heads = (heads, kv_heads, kv_heads)
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        shapes = [*((count * head_dim, HIDDEN) for count in self.heads), (HIDDEN, heads * head_dim)]
        dense = [draw(*shape, scale=shape[1] ** -0.5) for shape in shapes]
        self.matrices = dense if format is None else [quantize(one, format, name="m") for one in dense]
        self.biases = [draw(shape[0]) if has_bias else None for shape in shapes]
        norm_cols = [norm_cols or head_dim] * 2 if norm_cols != "all" else [heads * head_dim, kv_heads * head_dim]
        self.norms = [draw(cols) if norm else None for cols in norm_cols]
        self.exact = [
            one.double() if format is None else dequantize(one, torch.float32).double() for one in self.matrices
        ]
        attention = Attention(head_dim, (self.rotary_dim,) if self.rotary_dim else (), head_dim**-0.5, (norm, norm))
        self.kernel = AttentionKernel(attention, list(zip(self.matrices, self.biases, strict=True)), self.norms)

    def turn(self, texts):
        return tuple(self.draw(texts, 1, self.rotary_dim) for _ in range(2)) if self.rotary_dim else None

    def projected(self, hidden, turn):
        found = []
        for number, heads in enumerate(self.heads):
            row = self._linear(number, hidden.double())
            if number < 2 and self.norm:
                weight = self.norms[number].double()
                rows = row.view(len(row), -1, len(weight))
                scale = (rows.square().mean(-1, keepdim=True) + self.norm.epsilon).rsqrt()
                row = rows * scale * (weight + self.norm.shift)
            row = row.reshape(len(hidden), heads, 1, self.head_dim)
            if number < 2 and turn is not None:
                cos, sin = (one.double()[:, None] for one in turn)
                first, rest = row[..., : self.rotary_dim], row[..., self.rotary_dim :]
                left, right = first.chunk(2, dim=-1)
                row = torch.cat([first * cos + torch.cat([-right, left], -1) * sin, rest], -1)
            found.append(row)
        return found

    def attended(self, queries, keys, values):
        keys, values = (one.double().repeat_interleave(self.heads[0] // self.heads[1], 1) for one in (keys, values))
        weights = (queries.double() @ keys.mT * self.head_dim**-0.5).softmax(-1)
        return self._linear(3, (weights @ values).transpose(1, 2).flatten(2))

    def _linear(self, number, rows):
        bias = self.biases[number]
        return rows @ self.exact[number].T + (0 if bias is None else bias.double())


def close(found, expected, dtype):
    assert found.dtype == dtype
    return torch.allclose(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


PROJECTIONS = [
    {},
    {"rotary_dim": 0},
    {"rotary_dim": 8},
    {"has_bias": True},
    {"norm": Norm(1e-6), "heads": 5, "kv_heads": 1, "head_dim": 20},
    {"norm": Norm(1e-5, shift=1.0, rounds=False), "norm_cols": "all", "has_bias": True},
    *({"format": format} for format in FORMATS[1:]),
]


@pytest.mark.parametrize("options", PROJECTIONS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_queries_keys_and_values_are_near_float64(dtype, options, instruction_set):
    layer = Layer(dtype, **options)
    hidden, turn = layer.draw(3, 1, HIDDEN), layer.turn(3)
    for found, expected in zip(layer.kernel.project(hidden, turn), layer.projected(hidden, turn), strict=True):
        assert found.shape == expected.shape
        assert close(found, expected, dtype)


@pytest.mark.parametrize("tokens", [1, 7, 255, 256, 257, 1000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 64), (4, 2, 16), (6, 1, 20), (8, 8, 80), (15, 3, 8)]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_to_any_number_of_tokens_is_near_float64(dtype, heads, kv_heads, head_dim, tokens, instruction_set):
    layer = Layer(dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, has_bias=tokens % 2 == 0)
    queries = layer.draw(2, heads, 1, head_dim)
    keys, values = (layer.draw(2, kv_heads, tokens, head_dim) for _ in range(2))
    assert close(layer.kernel.attend(queries, keys, values), layer.attended(queries, keys, values), dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("rounds", [False, True])
def test_the_output_layer_may_be_in_low_bits(format, rounds):
    layer = Layer(torch.float32, format=format)
    attention = Attention(16, (16,), 0.25, (None, None))
    kernel = AttentionKernel(attention, list(zip(layer.matrices, layer.biases, strict=True)), rounds=rounds)
    queries, keys, values = layer.draw(1, 4, 1, 16), layer.draw(1, 2, 9, 16), layer.draw(1, 2, 9, 16)
    found, expected = kernel.attend(queries, keys, values).double(), layer.attended(queries, keys, values)
    assert torch.allclose(found, expected, rtol=0, atol=5e-2 * expected.std() if rounds and format else 1e-5)


def test_large_scores_do_not_overflow():
    layer = Layer(torch.float32)
    queries, keys = 1e4 * layer.draw(1, 4, 1, 16), 1e4 * layer.draw(1, 2, 600, 16)
    values = layer.draw(1, 2, 600, 16)
    assert close(layer.kernel.attend(queries, keys, values), layer.attended(queries, keys, values), torch.float32)


def test_a_value_that_is_no_number_is_not_lost():
    layer = Layer(torch.float32)
    queries, keys, values = layer.draw(1, 4, 1, 16), layer.draw(1, 2, 9, 16), layer.draw(1, 2, 9, 16)
    keys[0, 0, 4, 3] = float("nan")
    assert layer.kernel.attend(queries, keys, values).isnan().any()


def test_keys_and_values_may_lie_in_a_larger_cache():
    layer = Layer(torch.bfloat16)
    queries, room = layer.draw(2, 4, 1, 16), layer.draw(2, 2, 2, 50, 16)
    keys, values = room[0, :, :, :33], room[1, :, :, 5:38]
    whole = layer.kernel.attend(queries, keys.contiguous(), values.contiguous())
    assert torch.equal(layer.kernel.attend(queries, keys, values), whole)


def test_bits_depend_neither_on_threads_nor_on_other_texts(instruction_set):
    layer = Layer(torch.float32, heads=16, kv_heads=8, head_dim=64)
    hidden, turn = layer.draw(8, 1, HIDDEN), layer.turn(8)
    keys, values = (layer.draw(8, 8, 700, 64) for _ in range(2))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            projected = layer.kernel.project(hidden, turn)
            found.append((*projected, layer.kernel.attend(projected[0], keys, values)))
    finally:
        torch.set_num_threads(threads)
    alone = [layer.kernel.project(hidden[i : i + 1], tuple(one[i : i + 1] for one in turn)) for i in range(8)]
    apart = [layer.kernel.attend(one[0], keys[i : i + 1], values[i : i + 1]) for i, one in enumerate(alone)]
    found.append((*(torch.cat(parts) for parts in zip(*alone, strict=True)), torch.cat(apart)))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
