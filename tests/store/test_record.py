import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.expert import ITEMSIZE, ExpertSpec, FieldSpec
from transformers_moe_offload.store.record import ALIGNMENT, RecordLayout

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def fields_of_an_expert(draw):
    kinds = draw(st.lists(st.tuples(shapes, st.sampled_from(sorted(ITEMSIZE))), max_size=5))
    return tuple(FieldSpec(f"field_{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds))


@pytest.mark.parametrize("name", ITEMSIZE)
def test_every_dtype_we_know_is_one_of_torchs_with_the_size_we_think(name):
    dtype = torch_dtype(name)
    assert dtype.itemsize == ITEMSIZE[name]
    assert dtype_name(dtype) == name


@given(fields_of_an_expert())
def test_fields_are_aligned_apart_and_inside_the_record(fields):
    layout, end = RecordLayout(fields), 0
    for field in fields:
        start = layout.offsets[field.name]
        assert start % ALIGNMENT == 0
        assert start >= end
        end = start + field.nbytes
    assert end <= layout.nbytes
    assert layout.nbytes - end < ALIGNMENT or layout.nbytes == ALIGNMENT


@given(fields_of_an_expert())
def test_a_view_has_the_shape_and_dtype_of_its_field_and_shares_the_records_memory(fields):
    layout = RecordLayout(fields)
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(record)
    assert list(views) == [field.name for field in fields]
    for field in fields:
        view = views[field.name]
        assert tuple(view.shape) == field.shape
        assert dtype_name(view.dtype) == field.dtype
        if view.numel():
            assert view.data_ptr() == record.data_ptr() + layout.offsets[field.name]


def test_what_is_written_through_one_view_shows_in_no_other():
    layout = RecordLayout([FieldSpec("a", (3,), "int8"), FieldSpec("b", (3,), "int8")])
    views = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    views["a"].fill_(7)
    assert views["b"].tolist() == [0, 0, 0]


def test_a_record_longer_than_the_layout_is_seen_from_its_start():
    layout = RecordLayout([FieldSpec("a", (2,), "uint8")])
    assert layout.views(torch.arange(200, dtype=torch.uint8))["a"].tolist() == [0, 1]


def test_layouts_of_equal_fields_are_one_key():
    fields = [FieldSpec("a", (2,), "uint8")]
    assert {RecordLayout(fields): 1}[RecordLayout(fields)] == 1
    assert RecordLayout(fields) != RecordLayout([FieldSpec("a", (2,), "int8")])
    assert RecordLayout(fields) != fields


def test_an_expert_without_tensors_still_has_a_record():
    assert RecordLayout([]).nbytes == ALIGNMENT


def test_a_spec_counts_bytes_without_padding_and_names_its_experts():
    spec = ExpertSpec(3, "experts", 8, (FieldSpec("a", (2, 3), "bfloat16"), FieldSpec("b", (), "float32")))
    assert spec.expert_nbytes == 16


def test_a_cast_field_keeps_its_name_and_shape():
    assert FieldSpec("a", (2, 3), "float32").cast("bfloat16") == FieldSpec("a", (2, 3), "bfloat16")


def test_what_is_no_dtype_is_not_taken_for_one():
    with pytest.raises(AssertionError):
        torch_dtype("nn")
