"""Weight files are planned from shapes alone, known again when they are finished, and on disk when the block ends."""

import errno
import json
import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.output.shards import (
    Content,
    Syncing,
    expect_room,
    fill_shards,
    grouped,
    index_of,
    is_finished,
    shard_names,
    shard_of,
    write_contents,
)
from transformers_moe_offload.tensor_files.checksum import check_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64, "uint8": torch.uint8}
SPECS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=2).map(tuple)),
    min_size=1,
    max_size=9,
).map(lambda drawn: [FieldSpec(f"tensor.{i}", shape, dtype) for i, (dtype, shape) in enumerate(drawn)])


def value(spec: FieldSpec) -> torch.Tensor:
    count = torch.Size(spec.shape).numel()
    return (torch.arange(count) + len(spec.name)).reshape(spec.shape).to(DTYPES[spec.dtype])


def planned(specs, max_shard_bytes: int):
    groups = grouped([Content((spec,), lambda spec=spec: {spec.name: value(spec)}) for spec in specs], max_shard_bytes)
    return [shard_of(name, group) for name, group in zip(shard_names("model", len(groups)), groups, strict=True)]


def write(folder, shards, **options) -> int:
    told = []
    fill_shards(folder, shards, write_contents, told.append, **options)
    return sum(told)


@given(SPECS, st.integers(1, 300))
def test_whatever_is_written_is_read_again_and_every_byte_is_told(tmp_path_factory, specs, max_shard_bytes):
    folder = tmp_path_factory.mktemp("out")
    shards = planned(specs, max_shard_bytes)
    told = write(folder, shards)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [shard.name for shard in shards]
    assert [file.stat().st_size for file in files] == [shard.nbytes for shard in shards]
    assert told == sum(shard.nbytes for shard in shards)
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == {spec.name for spec in specs}
    for spec in specs:
        assert torch.equal(loaded[spec.name], value(spec))
        assert loaded[spec.name].dtype == DTYPES[spec.dtype]


@given(SPECS, st.integers(1, 300))
def test_no_shard_is_larger_than_it_may_be_unless_one_tensor_is(specs, max_shard_bytes):
    for shard in planned(specs, max_shard_bytes):
        assert len(shard.tensors) == 1 or sum(tensor.nbytes for tensor in shard.tensors) <= max_shard_bytes


def test_the_index_names_every_tensor_once():
    shards = planned([FieldSpec(f"t{number}", (4,), "float32") for number in range(5)], 32)
    index = index_of(shards)
    assert index["metadata"]["total_size"] == 80
    assert json.loads(json.dumps(index))["weight_map"] == {
        "t0": "model-00001-of-00003.safetensors",
        "t1": "model-00001-of-00003.safetensors",
        "t2": "model-00002-of-00003.safetensors",
        "t3": "model-00002-of-00003.safetensors",
        "t4": "model-00003-of-00003.safetensors",
    }


@pytest.fixture
def shards():
    return planned([FieldSpec(f"t{number}", (8, 8), "float32") for number in range(3)], 256)


def test_resuming_writes_what_is_missing_or_damaged_and_reads_nothing_else(tmp_path, shards, caplog):
    write(tmp_path, shards)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / shards[0].name).unlink()
    damaged = tmp_path / shards[1].name
    damaged.write_bytes(before[damaged.name][:-1] + b"\xff")
    read = []

    def fill(writer, content, done):
        read.extend(spec.name for part in content for spec in part.tensors)
        write_contents(writer, content, done)

    fill_shards(tmp_path, shards, fill, lambda nbytes: None, resumes=True)
    assert read == ["t0", "t1"]
    assert f"writing {damaged} again" in caplog.text
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_with_other_tensors_is_not_taken_for_finished(tmp_path, shards):
    write(tmp_path, shards)
    other = planned([FieldSpec("t0", (8, 9), "float32")], 300)[0]
    (tmp_path / shards[0].name).rename(tmp_path / other.name)
    check_file(tmp_path / other.name)
    assert not is_finished(other, tmp_path)


def test_a_computation_that_fails_leaves_no_file_of_its_shard(tmp_path, shards):
    def fill(writer, content, done):
        if "t1" in [spec.name for part in content for spec in part.tensors]:
            raise CheckpointError("the source is damaged")
        write_contents(writer, content, done)

    with pytest.raises(CheckpointError, match="the source is damaged"):
        fill_shards(tmp_path, shards, fill, lambda nbytes: None)
    assert [file.name for file in tmp_path.iterdir()] == [shards[0].name]


def test_room_is_needed_for_what_is_not_there_yet(tmp_path):
    huge = shard_of("huge", [Content((FieldSpec("t", (10**6, 10**9), "uint8"),), dict)])
    with pytest.raises(CheckpointError, match=r"takes 1,000,[\d,]+ more bytes in .*; free some, write elsewhere"):
        expect_room(tmp_path, [huge], "write elsewhere")
    (tmp_path / "huge").touch()
    expect_room(tmp_path, [huge], "write elsewhere")


SPEC = FieldSpec("tensor", (4,), "float32")


@pytest.fixture
def synced(monkeypatch):
    """Inodes that were synced; the first sync waits until it is told to go on."""
    original, found, may_go_on = os.fsync, [], threading.Event()

    def fsync(descriptor):
        assert may_go_on.wait(10)
        original(descriptor)
        found.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    return found, may_go_on


def two_shards():
    return [shard_of(name, (Content((SPEC,), lambda: {"tensor": torch.ones(4)}),)) for name in ("a", "b")]


def test_shards_are_written_before_they_are_synced_and_synced_before_the_block_ends(synced, tmp_path):
    found, may_go_on = synced
    with Syncing() as syncing:
        fill_shards(tmp_path, two_shards(), write_contents, lambda _: None, resumes=True, syncing=syncing)
        assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}
        assert found == []
        may_go_on.set()
    inodes = {(tmp_path / name).stat().st_ino for name in ("a", "b")}
    assert inodes <= set(found)


def test_what_an_earlier_attempt_has_finished_is_synced_too(synced, tmp_path):
    found, may_go_on = synced
    may_go_on.set()
    fill_shards(tmp_path, two_shards(), write_contents, lambda _: None)
    found.clear()
    with Syncing() as syncing:
        fill_shards(tmp_path, two_shards(), write_contents, lambda _: None, resumes=True, syncing=syncing)
    assert {(tmp_path / name).stat().st_ino for name in ("a", "b")} <= set(found)


def test_a_disk_that_does_not_take_them_is_an_error_of_ours(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "a").write_bytes(b"a")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match=r"cannot bring .*a to disk: Input/output error"), Syncing() as syncing:
        syncing.file(tmp_path / "a")


def test_an_error_in_the_block_is_not_hidden_by_one_of_the_disk(tmp_path):
    def block():
        with Syncing() as syncing:
            syncing.file(tmp_path / "nowhere")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        block()
