import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.formats.hqq import LARGEST, from_eight_bits, in_eight_bits, in_half, stored
from transformers_moe_offload.kernels.packed import META_BLOCK

finite = st.floats(-LARGEST, LARGEST, width=32)
alike = st.tuples(finite, st.lists(st.floats(0.5, 2, width=32), min_size=1, max_size=300)).map(
    lambda drawn: [max(-LARGEST, min(LARGEST, drawn[0] * factor)) for factor in drawn[1]]
)


@given(st.lists(finite, min_size=1, max_size=300) | alike)
def test_every_value_is_met_to_within_half_a_step_of_its_block(values):
    values = torch.tensor(values)
    codes, ranges = in_eight_bits(values)
    step = ranges[:, 1].double().repeat_interleave(META_BLOCK)[: len(values)]
    rounding = 1e-6 * (1 + values.abs().max())
    assert (from_eight_bits(codes, ranges) - values).abs().le(step / 2 + rounding).all()


@given(st.lists(finite, min_size=1, max_size=300))
def test_a_step_is_no_longer_than_the_block_needs(values):
    values = torch.tensor(values)
    for block, (_, step) in zip(values.split(META_BLOCK), in_eight_bits(values)[1].double(), strict=True):
        span = float(block.double().max() - block.double().min())
        assert step <= (span + 2**-9 * block.abs().max()) / 255 * (1 + 2**-9) + 2**-22


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 2.0**-24, LARGEST, -LARGEST])
def test_values_that_are_all_the_same_are_met_exactly(value):
    values = torch.full((200,), value)
    assert torch.equal(from_eight_bits(*in_eight_bits(values)), values)


def test_zero_stays_zero_where_nothing_is_less():
    values = torch.linspace(0, 0.37, 128)
    assert from_eight_bits(*in_eight_bits(values))[0] == 0


def test_blocks_do_not_touch_each_other():
    values = torch.linspace(1, 2, META_BLOCK)
    alone = in_eight_bits(values)
    codes, ranges = in_eight_bits(torch.cat([values, torch.tensor([1e4, -3e4])]))
    assert torch.equal(codes[:META_BLOCK], alone[0])
    assert torch.equal(ranges[:1], alone[1])


@pytest.mark.parametrize("meta_nbits", [16, 8])
def test_what_float16_cannot_hold_becomes_the_largest_it_can(meta_nbits):
    parts, read = stored(torch.tensor([1e9, -1e9]), meta_nbits, "zero")
    assert read.tolist() == pytest.approx([LARGEST, -LARGEST], rel=1e-2)
    assert all(torch.isfinite(part).all() for part in parts.values())


def test_in_16_bits_the_nearest_is_stored():
    values = torch.tensor([0.1, 1 / 3, -7.77])
    parts, read = stored(values, 16, "scale")
    assert list(parts) == ["scale"]
    assert torch.equal(read, values.half().float())
    assert torch.equal(in_half(values), parts["scale"])
