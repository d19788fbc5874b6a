import sys
from math import inf
from types import SimpleNamespace

import psutil
import pytest
import torch

from transformers_moe_offload.system import free_memory
from transformers_moe_offload.system.free_memory import DEVICE_RESERVE, available_bytes, page_cache_holds

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
