"""Rates of decoding are read off real layers, on a GPU or in Triton's interpreter; none has to be of any size."""

import importlib.util

import pytest
import torch
from torch import nn

from interpreted import DEVICE
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.config import HqqFormat
from transformers_moe_offload.device_decode.profiling import decode_rates
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.coding import ExpertCoding
from transformers_moe_offload.hybrid import profiling
from transformers_moe_offload.hybrid.split import MissRates
from transformers_moe_offload.store.record import RecordLayout

H, I = 32, 16  # noqa: E741 - hidden, intermediate
FIELDS = (FieldSpec("gate_up_proj", (2 * I, H), "float32"), FieldSpec("down_proj", (H, I), "float32"))
MISSES = MissRates(fetch_s=1.0, expert_s=2.0, row_s=3.0, trip_s=4.0)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Experts(nn.Module):
    act_fn = nn.SiLU()

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


@pytest.mark.gpu
@pytest.mark.parametrize("format", [None, HqqFormat(nbits=4, group_size=16)], ids=str)
def test_a_layer_is_measured_from_the_host_and_on_the_device(format, monkeypatch):
    coding = None if format is None else ExpertCoding(FIELDS, format)
    layout = RecordLayout(FIELDS if coding is None else coding.stored)
    monkeypatch.setattr(profiling, "COLD_BYTES", 4 * layout.nbytes)
    monkeypatch.setattr(profiling, "PASSES", 1)
    token = torch.ones(1, H, device=DEVICE)
    found = decode_rates(ExpertMlp(), Experts().eval(), token, 3, layout, coding, MISSES)
    assert found.misses is MISSES
    assert min(found.resident_s, found.read_s, found.submit_s) > 0
    assert found.host_s >= 0
