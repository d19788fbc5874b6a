import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stores import unopened
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.index import StoredTensor, check_index_file, read_header, read_index

DATA = bytes(range(16))


def entry(start=0, end=16, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write(path, header, data=DATA):
    """A safetensors file with a header of our own choosing: a dictionary, or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# What is right.


def test_a_tensor_is_found_where_it_lies(path):
    write(path, {"w": entry(4, 16, "BF16", (2, 3)), "v": entry(0, 4, "U8", (4,))})
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    assert set(tensors) == {"w", "v"}
    stored = tensors["w"]
    assert (stored.dtype, stored.shape, stored.nbytes, stored.file.path) == ("bfloat16", (2, 3), 12, path)
    target = bytearray(12)
    stored.file.read_into(memoryview(target), stored.offset)
    assert target == DATA[4:16]


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_safetensors_writes_is_read_as_torch_calls_it(path, dtype):
    save_file({"w": torch.zeros(2, 3, dtype=dtype)}, path)
    (stored,) = read_header(path)
    assert f"torch.{stored.dtype}" == str(dtype)
    assert stored.nbytes == 6 * dtype.itemsize


def test_metadata_is_no_tensor(path):
    write(path, {"__metadata__": {"format": "pt"}, "w": entry()})
    assert [tensor.name for tensor in read_header(path)] == ["w"]


def test_scalars_and_empty_tensors_are_tensors(path):
    write(path, {"scalar": entry(0, 4, "F32", ()), "empty": entry(4, 4, "F32", (0, 7))}, DATA[:4])
    assert [tensor.nbytes for tensor in read_header(path)] == [4, 0]


def test_a_file_without_tensors_has_none(path):
    assert read_header(write(path, {}, b"")) == []


def test_rows_divide_a_stacked_tensor_into_equal_pieces(tmp_path):
    stacked = StoredTensor("w", unopened(tmp_path / "f"), 100, "bfloat16", (6, 5))
    rows = [stacked.row(i, 3) for i in range(3)]
    assert [row.shape for row in rows] == [(2, 5)] * 3
    assert [row.offset for row in rows] == [100, 120, 140]
    assert sum(row.nbytes for row in rows) == stacked.nbytes


def test_an_index_holds_the_tensors_of_all_files(tmp_path):
    first = write(tmp_path / "1.safetensors", {"a": entry()})
    second = write(tmp_path / "2.safetensors", {"b": entry()})
    index = read_index([first, second])
    assert {name: stored.file.path for name, stored in index.items()} == {"a": first, "b": second}


# Files that are not what they say.


WHOLE = struct.pack("<Q", len(HEADER := json.dumps({"w": entry()}).encode())) + HEADER + DATA


@pytest.mark.parametrize("kept", range(len(WHOLE)))
def test_a_file_cut_off_anywhere_is_an_error(path, kept):
    path.write_bytes(WHOLE[:kept])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if kept >= 8 + len(HEADER):
        assert f"has {kept} bytes, but tensor w reaches to byte {len(WHOLE)}" in str(caught.value)
    elif kept >= 8:
        assert f"has {kept} bytes, fewer than its header of {len(HEADER)} bytes" in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_are_an_error_or_no_tensors_at_all(path, data):
    path.write_bytes(data)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert found == []


def test_a_header_longer_than_the_file_names_both_lengths(path):
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match=r"has 10 bytes, fewer than its header of 1,099,511,627,776 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"garbage", b"\xff\xfe\x00", b'{"w": }', b"[" * 100_000],
    ids=["empty", "cut", "text", "binary", "no value", "deeply nested"],
)
def test_a_header_that_is_no_json_is_an_error(path, header):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(write(path, header))


@pytest.mark.parametrize("header", [b"[]", b"3", b"null", b'"text"'])
def test_a_header_that_is_no_object_is_an_error(path, header):
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_header(write(path, header))


@pytest.mark.parametrize(
    "described",
    [
        {},
        None,
        [],
        "text",
        7,
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.5], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": 16},
        {"dtype": "F32", "shape": [4], "data_offsets": ["a", "b"]},
        {"dtype": "F32", "shape": [4], "data_offsets": "ab"},
        {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [None, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
    ],
    ids=str,
)
def test_a_tensor_described_in_another_form_is_an_error_that_names_it(path, described):
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*tensor w "):
        read_header(write(path, {"w": described}))


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones(path):
    with pytest.raises(CheckpointError, match=r"stores tensor w as 'F4', which is not one of \['BF16'"):
        read_header(write(path, {"w": entry(dtype="F4")}))


@pytest.mark.parametrize(
    ("described", "given", "needed"),
    [
        (entry(0, 15), "15", "16"),
        (entry(0, 12), "12", "16"),
        (entry(8, 4), "-4", "16"),
        (entry(0, 16, "BF16"), "16", "8"),
        (entry(0, 16, "F32", (2, 3)), "16", "24"),
    ],
    ids=str,
)
def test_a_range_that_does_not_fit_the_shape_names_both_lengths(path, described, given, needed):
    with pytest.raises(CheckpointError, match=rf"gives tensor w {given} bytes, but .* takes {needed}$"):
        read_header(write(path, {"w": described}))


def test_a_range_past_the_end_of_the_file_names_both_ends(path):
    size = write(path, {"w": entry(16, 32)}).stat().st_size
    with pytest.raises(CheckpointError, match=f"has {size} bytes, but tensor w reaches to byte {size + 16}"):
        read_header(path)


@pytest.mark.parametrize(
    "described",
    [entry(-4, 12), entry(-16, 0), entry(0, 0, "F32", (-1, 0)), entry(0, 16, "F32", (-2, -2))],
    ids=str,
)
def test_negative_offsets_and_shapes_are_errors(path, described):
    """The header itself lies before the data: a negative offset would read it as weights."""
    with pytest.raises(CheckpointError, match="tensor w"):
        read_header(write(path, {"w": described}))


@pytest.mark.parametrize("start", [0, 4, 12])
def test_two_tensors_in_the_same_bytes_are_an_error(path, start):
    """As in the safetensors library: no writer makes such a file, so one of the two would be wrong weights."""
    header = {"v": entry(0, 16), "w": entry(start, start + 16)}
    with pytest.raises(CheckpointError, match="tensor"):
        read_header(write(path, header, DATA * 2))


def test_a_missing_file_is_an_error_that_names_it(path):
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: No such file"):
        read_header(path)


def test_a_folder_in_place_of_the_file_is_an_error(path):
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "safetensors", "model.safetensors.index.json"])
def test_a_file_of_another_format_is_an_error_that_says_how_to_convert_it(tmp_path, name):
    write(tmp_path / name, {"w": entry()})
    with pytest.raises(CheckpointError, match=r"not a safetensors file; .* convert the checkpoint"):
        read_header(tmp_path / name)


def test_a_tensor_stored_in_two_files_is_an_error_that_names_both(tmp_path):
    paths = [write(tmp_path / f"{i}.safetensors", {"w": entry()}) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"tensor w is stored twice, in .*0\.safetensors and in .*1\.safetensors"):
        read_index(paths)


# The index file beside the shards.


@pytest.fixture
def sharded(tmp_path):
    """Two shards, and a function that writes an index file and checks it against them."""
    paths = [write(tmp_path / f"{name}.safetensors", {name: entry()}) for name in "ab"]

    def check(weight_map):
        index_path = tmp_path / "model.safetensors.index.json"
        index_path.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
        check_index_file(index_path, read_index(paths))

    return check


def test_an_index_that_tells_the_truth_is_accepted(sharded):
    sharded({"a": "a.safetensors", "b": "b.safetensors"})


def test_an_index_may_be_silent_about_a_tensor(sharded):
    sharded({"a": "a.safetensors"})


def test_an_index_that_places_a_tensor_in_the_wrong_shard_is_an_error(sharded):
    with pytest.raises(CheckpointError, match=r"places a in b\.safetensors, but that file does not hold it"):
        sharded({"a": "b.safetensors", "b": "b.safetensors"})


def test_an_index_that_names_a_tensor_nobody_holds_is_an_error(sharded):
    with pytest.raises(CheckpointError, match=r"places c in a\.safetensors, but that file does not hold it"):
        sharded({"c": "a.safetensors"})


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/../../a.safetensors", "..", 3, None])
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded, shard):
    with pytest.raises(CheckpointError, match="refusing to read outside"):
        sharded({"a": shard})


@pytest.mark.parametrize("shard", ["", ".", "a", "sub/a.safetensors"])
def test_an_index_that_names_no_shard_we_have_is_refused(sharded, shard):
    with pytest.raises(CheckpointError, match="places a in"):
        sharded({"a": shard})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"weight_map": 3}', '{"weight_map": null}'])
def test_an_index_that_cannot_be_read_as_one_is_an_error(sharded, text):
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        sharded(text)


def test_a_missing_index_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*index\.json: No such file"):
        check_index_file(tmp_path / "model.safetensors.index.json", {})
