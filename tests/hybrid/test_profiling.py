"""Rates are read off real transfers and products; no test says how fast a machine has to be."""

import pytest
import torch
from torch import nn

from compute.layers import MLP, H, I
from copiers import FakeCopier
from transformers_moe_offload.expert import ExpertId, FieldSpec
from transformers_moe_offload.hybrid import profiling
from transformers_moe_offload.hybrid.cpu_experts import HostCompute
from transformers_moe_offload.hybrid.profiling import fetch_seconds, host_seconds, measured_rates
from transformers_moe_offload.slots.cuda.copier import CudaCopier
from transformers_moe_offload.slots.transfer import HostCopier
from transformers_moe_offload.store.record import RecordLayout, whole


class Experts(nn.Module):
    act_fn = staticmethod(torch.tanh)


LAYOUT = RecordLayout([FieldSpec("up_proj", (I, H), "float32"), FieldSpec("down_proj", (H, I), "float32")])


@pytest.fixture
def host():
    computer = HostCompute()
    yield computer
    computer.close()


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request):
    return torch.device(request.param)


def test_all_rates_of_a_layer_are_measured(host, device, monkeypatch):
    monkeypatch.setattr(profiling, "COLD_BYTES", 4 * LAYOUT.nbytes)
    copiers = []

    def copier(read):
        if device.type == "cuda":
            copiers.append(CudaCopier(whole(read, LAYOUT.nbytes), 2, device, LAYOUT.nbytes, True))
        else:
            copiers.append(HostCopier(whole(read, LAYOUT.nbytes), 2))
        return copiers[-1]

    token = torch.ones(1, H, device=device)
    found = measured_rates(MLP, Experts(), token, LAYOUT.nbytes, LAYOUT.views, copier, host)
    assert len(copiers) == 1
    assert min(found.fetch_s, found.expert_s, found.trip_s) > 0
    assert found.row_s >= 0


@pytest.mark.parametrize(("nbytes", "num_slots"), [(1 << 30, 8), (LAYOUT.nbytes * 3, 3), (1, 1)])
def test_large_experts_are_moved_in_smaller_numbers(host, monkeypatch, nbytes, num_slots):
    """The cache may have taken all but a gigabyte of the GPU's memory."""
    monkeypatch.setattr(profiling, "COLD_BYTES", LAYOUT.nbytes)
    monkeypatch.setattr(profiling, "MOVED_BYTES", nbytes)
    copier = FakeCopier()
    measured_rates(MLP, Experts(), torch.ones(1, H), LAYOUT.nbytes, LAYOUT.views, lambda read: copier, host)
    assert {expert.expert for expert in copier.started} == set(range(num_slots))


def test_every_slot_receives_a_record_in_every_pass():
    copier = FakeCopier()
    fetch_seconds(copier, [torch.empty(8, dtype=torch.uint8) for _ in range(3)])
    assert copier.started == [ExpertId(0, expert) for expert in range(3)] * (1 + profiling.PASSES)


def test_the_host_is_timed_with_one_row_and_with_many_of_every_expert():
    calls = []
    experts = [{"number": torch.tensor(number)} for number in range(3)]
    host_seconds(lambda rows, weights: calls.append((len(rows), int(weights["number"]))), experts, torch.ones(1, H))
    passes = 1 + profiling.PASSES
    assert calls == [(1, 0), (1, 1), (1, 2)] * passes + [(profiling.MANY_ROWS, number) for number in range(3)] * passes


def test_made_experts_are_numbers_that_no_processor_is_slow_with():
    record = torch.full((64,), profiling.FILLING, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = record.view(dtype).float()
        assert values.isfinite().all()
        assert values.abs().min() > 1e-3
