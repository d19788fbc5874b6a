"""Codes come out of the bytes as they went in, and lie in them as the hqq package lays them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.kernels.packed import PackedMatrix, Packing, pack, unpack, unpack_rows

from .matrices import NBITS, random_codes


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from(NBITS), st.integers(0, 2**32))
def test_codes_come_out_as_they_went_in(rows, groups, nbits, seed):
    packing = Packing(rows, groups * 16, nbits, 16, 16)
    codes = random_codes(packing, seed)
    parts = pack(codes, packing)
    assert {part.name: part.shape for part in packing.parts if part.name in parts} == {
        name: tuple(part.shape) for name, part in parts.items()
    }
    assert torch.equal(unpack(PackedMatrix(packing, parts)), codes)


@given(st.data(), st.integers(1, 40), st.sampled_from(NBITS))
def test_some_rows_come_out_as_all_do(data, rows, nbits):
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    packing = Packing(rows, 16, nbits, 16, 16)
    codes = random_codes(packing)
    found = torch.empty((stop - start, 16), dtype=torch.uint8)
    unpack_rows(PackedMatrix(packing, pack(codes, packing)), start, found, torch.empty_like(found))
    assert torch.equal(found, codes[start:stop])


@pytest.mark.parametrize("nbits", NBITS)
def test_rows_that_fill_up_a_byte_are_zero(nbits):
    packing = Packing(1, 16, nbits, 16, 16)
    parts = pack(torch.full((1, 16), 2**nbits - 1, dtype=torch.uint8), packing)
    highest = {8: 0xFF, 4: 0xF0, 3: 0xC0, 2: 0xC0, 1: 0x80}[nbits]
    assert parts["codes"].unique().tolist() == [highest]


@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
@pytest.mark.parametrize("rows", [8, 24])
def test_the_bytes_are_those_of_the_hqq_package(nbits, rows):
    bitpack = pytest.importorskip("hqq.core.bitpack").BitPack
    packing = Packing(rows, 64, nbits, 16, 16)
    codes = random_codes(packing)
    ours = pack(codes, packing)
    assert torch.equal(ours["codes"], getattr(bitpack, f"pack_{nbits}bit_u8")(codes))
    theirs = getattr(bitpack, f"unpack_{nbits}bit_u8")(ours["codes"])
    assert torch.equal(unpack(PackedMatrix(packing, ours)), theirs)
