"""How much memory may be taken, given what is free and what control groups leave, read from made trees."""

import sys
from math import inf
from types import SimpleNamespace

import psutil
import pytest
import torch

from transformers_moe_offload.system import free_memory
from transformers_moe_offload.system.free_memory import DEVICE_RESERVE, available_bytes, memory_left, page_cache_holds

GIB = 1 << 30
CPU = torch.device("cpu")


@pytest.fixture
def limited(monkeypatch):
    """Lets control groups leave so much, on a machine with 100 GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    return lambda left: monkeypatch.setattr(free_memory, "memory_left", lambda: left)


def test_without_a_limit_half_of_the_free_ram_may_be_taken(limited):
    limited(inf)
    assert available_bytes(CPU) == 50 * GIB


def test_under_a_limit_half_of_what_it_leaves_may_be_taken(limited):
    limited(6 * GIB)
    assert available_bytes(CPU) == 3 * GIB


def test_a_limit_above_what_the_machine_has_free_does_not_count(limited):
    limited(500 * GIB)
    assert available_bytes(CPU) == 50 * GIB


def test_the_page_cache_holds_no_more_than_a_limit_leaves(limited):
    limited(10 * GIB)
    assert page_cache_holds(5 * GIB) == (sys.platform == "linux")
    assert not page_cache_holds(9 * GIB)


def test_a_gpu_gives_what_is_free_less_a_reserve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    assert available_bytes(torch.device("cuda", 0)) == 5 * GIB - DEVICE_RESERVE


def test_what_torch_keeps_of_freed_memory_is_free(monkeypatch):
    kept = [3 * GIB]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB - sum(kept), 8 * GIB))
    assert available_bytes(torch.device("cuda", 0)) == 5 * GIB - DEVICE_RESERVE


def test_a_gpu_that_is_nearly_full_gives_nothing_rather_than_less(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (DEVICE_RESERVE // 2, 8 * GIB))
    assert available_bytes(torch.device("cuda", 0)) == 0


def test_this_machine_has_some_and_never_more_than_it_has_free():
    assert 0 <= available_bytes(CPU) <= psutil.virtual_memory().total


NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """Made trees of control groups, and the process's place in them."""

    def __init__(self, folder):
        self.root, self.membership = folder / "cgroup", folder / "membership"
        self.root.mkdir()

    def v2(self, group, limit, used=0, stat="anon 5\ninactive_file 0"):
        self._write(group, {"memory.max": limit, "memory.current": used, "memory.stat": stat})

    def v1(self, group, limit, used=0, stat="cache 5\ntotal_inactive_file 0"):
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
        self._write(f"memory/{group}", files)

    def is_in(self, *lines):
        self.membership.write_text("".join(f"{line}\n" for line in lines))

    @property
    def left(self):
        return memory_left(self.root, self.membership)

    def _write(self, group, files):
        folder = self.root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture(params=["v1", "v2"])
def limit(request, machine):
    """Sets the limit of one of this process's groups, in either version."""
    machine.is_in("4:memory:/outer/inner", "0::/outer/inner")
    return getattr(machine, request.param)


def test_without_control_groups_there_is_no_limit(machine):
    assert machine.left == inf


def test_a_group_has_what_its_limit_leaves_it(machine, limit):
    limit("outer/inner", 10 * GIB, 4 * GIB)
    assert machine.left == 6 * GIB


def test_a_container_that_sees_itself_as_the_root_has_its_own_limit(machine, limit):
    limit("", 10 * GIB, 4 * GIB)
    assert machine.left == 6 * GIB


def test_the_tightest_of_the_groups_around_counts(machine, limit):
    limit("", 50 * GIB)
    limit("outer", 20 * GIB, 15 * GIB)
    limit("outer/inner", 10 * GIB, 2 * GIB)
    assert machine.left == 5 * GIB


def test_other_groups_do_not_count(machine, limit):
    limit("outer/inner", 10 * GIB)
    limit("outer/neighbour", GIB)
    assert machine.left == 10 * GIB


def test_a_group_over_its_limit_has_nothing(machine, limit):
    limit("outer", 10 * GIB, 11 * GIB)
    assert machine.left == 0


@pytest.mark.parametrize(
    ("version", "stat"),
    [
        ("v1", f"inactive_file 7\ntotal_inactive_file {5 * GIB}\ntotal_active_file 9"),
        ("v2", f"anon 1\ninactive_file {5 * GIB}\nactive_file 7"),
    ],
)
def test_page_cache_that_was_not_used_lately_counts_as_free(machine, version, stat):
    machine.is_in("4:cpu,memory:/", "0::/")
    getattr(machine, version)("", 10 * GIB, 9 * GIB, stat)
    assert machine.left == 6 * GIB


def test_groups_without_a_limit_leave_more_than_any_machine_has(machine):
    machine.v2("", "max", 3 * GIB)
    assert machine.left == inf
    machine.v1("", NO_LIMIT_V1, 3 * GIB)
    assert machine.left > 2**60


def test_the_limits_of_both_versions_count(machine):
    machine.is_in("4:memory:/own", "0::/own")
    machine.v1("own", 8 * GIB)
    machine.v2("own", 6 * GIB)
    assert machine.left == 6 * GIB


def test_a_group_of_version_2_beside_version_1_counts(machine):
    machine.is_in("0::/own")
    machine.v2("unified/own", 6 * GIB)
    assert machine.left == 6 * GIB


@pytest.mark.parametrize(
    ("limit_text", "used", "stat"),
    [
        (10 * GIB, "not a number", "inactive_file 0"),
        (10 * GIB, 0, "a line of four words"),
        (10 * GIB, 0, "inactive_file many"),
        ("", 0, "inactive_file 0"),
    ],
)
def test_files_of_another_form_are_taken_for_no_limit(machine, limit_text, used, stat):
    machine.is_in("0::/")
    machine.v2("", limit_text, used, stat)
    assert machine.left == inf


@pytest.mark.parametrize("line", ["nonsense", "0::/../elsewhere", "4:memory:"])
def test_a_place_that_cannot_be_found_is_no_error(machine, line):
    machine.is_in(line)
    machine.v2("", 7 * GIB)
    machine.v2("../elsewhere", GIB)
    assert machine.left == 7 * GIB


def test_this_process_can_be_asked():
    assert memory_left() >= 0
