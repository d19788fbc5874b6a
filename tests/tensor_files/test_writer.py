"""A file written piece by piece is a safetensors file like any other, whole or not there, and damage to it is found."""

import multiprocessing
import resource
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ITEMSIZE, FieldSpec
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.checksum import check_file
from transformers_moe_offload.tensor_files.index import read_header
from transformers_moe_offload.tensor_files.writer import PAGE_BYTES, PARTIAL, SafetensorsWriter, file_bytes, write_text

RECORDS = FieldSpec("experts.records", (3, PAGE_BYTES), "uint8")
SUMS = FieldSpec("experts.checksums", (3,), "int64")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def random(spec: FieldSpec) -> torch.Tensor:
    raw = torch.randint(0, 2 if spec.dtype == "bool" else 256, (spec.nbytes,), dtype=torch.uint8)
    return raw.view(torch_dtype(spec.dtype)).view(spec.shape)


def write(path, *specs: FieldSpec) -> dict[str, torch.Tensor]:
    tensors = {spec.name: random(spec) for spec in specs}
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(host_bytes(tensor.contiguous().view(-1).view(torch.uint8)))


# What is written.


def test_rows_written_one_at_a_time_are_one_tensor(path):
    rows = random(RECORDS)
    with SafetensorsWriter(path, [RECORDS, SUMS]) as writer:
        for row in rows:
            writer.write(RECORDS.name, row)
        writer.write(SUMS.name, torch.arange(3))
    loaded = load_file(path)
    assert torch.equal(loaded[RECORDS.name], rows)
    assert torch.equal(loaded[SUMS.name], torch.arange(3))


def test_the_data_begin_at_a_page_with_the_first_tensor_declared(path):
    write(path, RECORDS, SUMS)
    offsets = {tensor.name: tensor.offset for tensor in read_header(path)}
    assert offsets[RECORDS.name] % PAGE_BYTES == 0
    assert offsets[SUMS.name] == offsets[RECORDS.name] + RECORDS.nbytes
    assert path.stat().st_size == file_bytes([RECORDS, SUMS])


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_is_read_back_by_safetensors_bit_for_bit(path, dtype):
    if not hasattr(torch, dtype):
        pytest.skip("not a dtype of this torch")
    shapes = {"matrix": (2, 3), "scalar": (), "nothing": (0, 4)}
    tensors = write(path, *(FieldSpec(name, shape, dtype) for name, shape in shapes.items()))
    (stored, *_) = read_header(path)
    assert stored.dtype == dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert all(same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_in_any_order_give_the_same_file_as_whole_tensors(tmp_path, data):
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=5))
    specs = [FieldSpec(f"t{i}", shape, "float32") for i, shape in enumerate(shapes)]
    tensors = {spec.name: random(spec) for spec in specs}
    with SafetensorsWriter(tmp_path / "whole", specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    pieces = data.draw(st.permutations([name for name, tensor in tensors.items() for _ in tensor]))
    rows = {name: iter(tensor) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "pieces", specs) as writer:
        for name in pieces:
            writer.write(name, next(rows[name]))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_what_is_not_contiguous_is_written_as_it_reads(path):
    matrix = torch.randn(4, 6)
    with SafetensorsWriter(path, [FieldSpec("w", (6, 4), "float32")]) as writer:
        writer.write("w", matrix.t())
    assert torch.equal(load_file(path)["w"], matrix.t())


def test_no_more_than_a_row_is_held_at_a_time(path):
    held = []

    def row(number):
        held.append(number)
        return torch.full((PAGE_BYTES,), number, dtype=torch.uint8)

    with SafetensorsWriter(path, [RECORDS]) as writer:
        for number in range(3):
            writer.write(RECORDS.name, row(number))
            assert held == list(range(number + 1))
    assert load_file(path)[RECORDS.name][:, 0].tolist() == [0, 1, 2]


# Whole or not at all.


def test_until_it_is_complete_there_is_no_file(path):
    with SafetensorsWriter(path, [SUMS]) as writer:
        writer.write(SUMS.name, torch.arange(3))
        assert not path.exists()
    assert path.exists()
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_nothing_behind_and_an_older_file_as_it_was(path):
    write(path, SUMS)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), SafetensorsWriter(path, [SUMS]) as writer:
        writer.write(SUMS.name, torch.ones(3).expand(-5))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("is_written", [lambda path: write(path, SUMS), lambda path: write_text(path, "text")])
def test_a_link_under_the_name_of_the_unfinished_file_is_not_followed(path, tmp_path_factory, is_written):
    """In a folder that others may write to, they know what it is called."""
    mine = tmp_path_factory.mktemp("mine") / "kept"
    mine.write_text("kept")
    path.with_name(path.name + PARTIAL).symlink_to(mine)
    is_written(path)
    assert mine.read_text() == "kept"
    assert path.stat().st_size > 0
    assert not path.is_symlink()


def test_a_tensor_that_was_left_out_is_not_papered_over(path):
    with pytest.raises(AssertionError, match=r"experts\.checksums: 0 of 24 bytes"), SafetensorsWriter(path, [SUMS]):
        pass
    assert list(path.parent.iterdir()) == []


def test_too_small_a_disk_is_noticed_before_anything_is_written(path):
    free = shutil.disk_usage(path.parent).free
    huge = FieldSpec("w", (2 * free,), "uint8")
    with pytest.raises(CheckpointError, match=r"model\.safetensors takes [\d,]+ bytes, but [\d,]+ are free") as error:
        SafetensorsWriter(path, [huge]).__enter__()
    assert f"{file_bytes([huge]):,}" in str(error.value)
    assert list(path.parent.iterdir()) == []


def _write_within(limit, path, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(path, FieldSpec("w", (10 * limit,), "uint8"))
    except CheckpointError as error:
        answer.send((str(error), [file.name for file in path.parent.iterdir()]))


def test_a_write_that_the_system_refuses_is_one_clear_error(path):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_write_within, args=(100_000, path, sender))
    child.start()
    assert receiver.poll(60)
    message, left_behind = receiver.recv()
    child.join()
    assert f"cannot write {path}: File too large; it takes 1,004,096 bytes, and " in message
    assert left_behind == []


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
        write(tmp_path / "nowhere" / "model.safetensors", SUMS)
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
        write_text(tmp_path / "nowhere" / "config.json", "{}")


# Checksums.


def test_an_intact_file_passes_and_lists_its_tensors_in_their_order(path):
    write(path, RECORDS, SUMS)
    assert [tensor.name for tensor in check_file(path)] == [RECORDS.name, SUMS.name]


def test_a_bit_that_flipped_anywhere_is_found_and_the_tensor_named(path):
    write(path, RECORDS, SUMS)
    whole = path.read_bytes()
    for tensor in read_header(path):
        for place in (tensor.offset, tensor.offset + tensor.nbytes - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"holds tensor {tensor.name} with checksum .* damaged"):
                check_file(path)


def test_a_file_that_is_cut_short_is_found(path):
    write(path, RECORDS, SUMS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        check_file(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_somebody_else_has_no_checksums_to_check(path, metadata):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="not written by moe-offload"):
        check_file(path)
