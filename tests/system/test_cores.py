"""How many cores control groups leave, read from made trees, and what is said where torch has more threads."""

import logging
from math import inf

import pytest
import torch

from transformers_moe_offload.system import cores
from transformers_moe_offload.system.cores import granted_cores, warn_of_idle_threads


@pytest.fixture
def tree(tmp_path):
    """Makes groups from the content of their files, and a process in some of them -> cores that it is left."""

    def made(files, membership):
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
        (tmp_path / "self").write_text(membership)
        return granted_cores(tmp_path, tmp_path / "self")

    return made


def test_version_2_grants_a_quota_of_each_period(tree):
    assert tree({"a/cpu.max": "50000 100000\n"}, "0::/a\n") == 0.5


def test_the_tightest_group_around_counts(tree):
    files = {"cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n", "a/b/cpu.max": "400000 100000\n"}
    assert tree(files, "0::/a/b\n") == 1.5


def test_version_1_has_the_quota_in_files_of_its_own(tree):
    files = {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}
    assert tree(files, "4:cpu,cpuacct:/a\n3:memory:/b\n") == 2


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"a/cpu.max": "max 100000\n"},
        {"a/cpu.max": "nonsense\n"},
        {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "0\n"},
    ],
)
def test_without_a_limit_that_can_be_read_there_is_none(tree, files):
    assert tree(files, "4:cpu:/a\n0::/a\n") == inf


def test_a_system_without_control_groups_sets_no_limit(tmp_path):
    assert granted_cores(tmp_path / "nothing", tmp_path / "none") == inf


@pytest.mark.parametrize(("granted", "threads", "suggested"), [(0.5, 2, 1), (1.5, 3, 2), (4.0, 16, 4)])
def test_more_threads_than_cores_are_said_with_both_numbers(monkeypatch, caplog, granted, threads, suggested):
    monkeypatch.setattr(cores, "granted_cores", lambda: granted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with caplog.at_level(logging.WARNING):
        warn_of_idle_threads()
    assert f"torch uses {threads} threads, but a control group leaves this process {granted:g} cores" in caplog.text
    assert f"OMP_NUM_THREADS={suggested}" in caplog.text


@pytest.mark.parametrize(("granted", "threads"), [(inf, 64), (0.5, 1), (1.5, 2), (8.0, 8)])
def test_no_more_threads_than_cores_are_not_mentioned(monkeypatch, caplog, granted, threads):
    monkeypatch.setattr(cores, "granted_cores", lambda: granted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    warn_of_idle_threads()
    assert not caplog.text
