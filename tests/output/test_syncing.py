"""Files are on disk when the block ends, or an error says that they are not."""

import errno
import os
import threading

import pytest
import torch

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.output.shards import Content, fill_shards, shard_of, write_contents
from transformers_moe_offload.output.syncing import Syncing

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


def shards():
    return [shard_of(name, (Content((SPEC,), lambda: {"tensor": torch.ones(4)}),)) for name in ("a", "b")]


def test_shards_are_written_before_they_are_synced_and_synced_before_the_block_ends(synced, tmp_path):
    found, may_go_on = synced
    with Syncing() as syncing:
        fill_shards(tmp_path, shards(), write_contents, lambda _: None, resumes=True, syncing=syncing)
        assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}
        assert found == []
        may_go_on.set()
    inodes = {(tmp_path / name).stat().st_ino for name in ("a", "b")}
    assert inodes <= set(found)


def test_what_an_earlier_attempt_has_finished_is_synced_too(synced, tmp_path):
    found, may_go_on = synced
    may_go_on.set()
    fill_shards(tmp_path, shards(), write_contents, lambda _: None)
    found.clear()
    with Syncing() as syncing:
        fill_shards(tmp_path, shards(), write_contents, lambda _: None, resumes=True, syncing=syncing)
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
