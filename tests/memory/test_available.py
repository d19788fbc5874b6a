from types import SimpleNamespace

import psutil
import pytest
import torch

from transformers_moe_offload.memory import available
from transformers_moe_offload.memory.available import DEVICE_RESERVE, available_bytes

GIB = 1 << 30
CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes the files of a container with a limit, on a machine with 100 GiB free."""
    monkeypatch.setattr(available, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))

    def container(limit, current="0", stat="anon 5\ninactive_file 0\n"):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(stat)

    return container


def test_outside_of_a_container_half_of_the_free_ram_may_be_taken(machine):
    assert available_bytes(CPU) == 50 * GIB


def test_a_container_without_a_limit_changes_nothing(machine):
    machine("max", 3 * GIB)
    assert available_bytes(CPU) == 50 * GIB


def test_a_container_has_what_its_limit_leaves_it(machine):
    machine(10 * GIB, 4 * GIB)
    assert available_bytes(CPU) == 3 * GIB


def test_a_limit_above_what_the_machine_has_free_does_not_count(machine):
    machine(500 * GIB)
    assert available_bytes(CPU) == 50 * GIB


def test_page_cache_that_can_be_dropped_counts_as_free(machine):
    machine(10 * GIB, 9 * GIB, f"anon 1\ninactive_file {5 * GIB}\nactive_file 7\n")
    assert available_bytes(CPU) == 3 * GIB


def test_a_container_over_its_limit_has_nothing(machine):
    machine(10 * GIB, 11 * GIB)
    assert available_bytes(CPU) == 0


@pytest.mark.parametrize(
    ("limit", "current", "stat"),
    [(10 * GIB, "not a number", "inactive_file 0"), (10 * GIB, 0, "a line of four words"), ("", 0, "inactive_file 0")],
)
def test_files_of_another_form_are_taken_for_no_container(machine, limit, current, stat):
    machine(limit, current, stat)
    assert available_bytes(CPU) == 50 * GIB


def test_a_gpu_gives_what_is_free_less_a_reserve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    assert available_bytes(torch.device("cuda", 0)) == 5 * GIB - DEVICE_RESERVE


def test_a_gpu_that_is_nearly_full_gives_nothing_rather_than_less(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (DEVICE_RESERVE // 2, 8 * GIB))
    assert available_bytes(torch.device("cuda", 0)) == 0


def test_this_machine_has_some_and_never_more_than_it_has_free():
    assert 0 <= available_bytes(CPU) <= psutil.virtual_memory().total
