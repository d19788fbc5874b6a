from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from transformers_moe_offload.compute.mlp import ExpertMlp

# N rows, H hidden, I intermediate

N, H, I = 5, 4, 6  # noqa: E741 - the letters of the legend


def gated(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


EXPERTS = SimpleNamespace(_apply_gate=gated, act_fn=torch.tanh, post_expert_norm=lambda out: out / 7)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


ROWS = random(N, H)
WEIGHTS = {
    "gate_up_proj": random(2 * I, H),
    "up_proj": random(I, H),
    "down_proj": random(H, I),
    "gate_up_proj_bias": random(2 * I),
    "up_proj_bias": random(I),
    "down_proj_bias": random(H),
}


def by_hand(mlp):
    """The formula of each combination of flags, written with plain products."""
    has_bias = 1 if mlp.has_bias else 0
    if mlp.has_gate:
        gate_up = ROWS @ WEIGHTS["gate_up_proj"].T + has_bias * WEIGHTS["gate_up_proj_bias"]
        gate, up = gate_up[:, :I], gate_up[:, I:]
        hidden = gate * torch.sigmoid(gate) * up
    else:
        hidden = torch.tanh(ROWS @ WEIGHTS["up_proj"].T + has_bias * WEIGHTS["up_proj_bias"])
    out = hidden @ WEIGHTS["down_proj"].T + has_bias * WEIGHTS["down_proj_bias"]
    return out / 7 if mlp.has_post_expert_norm else out


@pytest.mark.parametrize("has_post_expert_norm", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_every_combination_of_flags_computes_its_formula(has_gate, has_bias, is_transposed, has_post_expert_norm):
    mlp = ExpertMlp(has_gate, has_bias, is_transposed, has_post_expert_norm)
    names = ["gate_up_proj" if has_gate else "up_proj", "down_proj"]
    weights = {name: WEIGHTS[name].T.contiguous() if is_transposed else WEIGHTS[name] for name in names}
    if has_bias:
        weights |= {f"{name}_bias": WEIGHTS[f"{name}_bias"] for name in names}
    torch.testing.assert_close(mlp(EXPERTS, ROWS, weights), by_hand(mlp))


def test_a_missing_bias_is_an_error_and_not_zero():
    with pytest.raises(KeyError, match="gate_up_proj_bias"):
        ExpertMlp(has_bias=True)(EXPERTS, ROWS, {name: WEIGHTS[name] for name in ("gate_up_proj", "down_proj")})


def test_the_gate_is_the_modules_own():
    clamped = SimpleNamespace(_apply_gate=lambda gate_up: gate_up[:, :I].clamp(max=0))
    expected = (ROWS @ WEIGHTS["gate_up_proj"].T)[:, :I].clamp(max=0) @ WEIGHTS["down_proj"].T
    torch.testing.assert_close(ExpertMlp()(clamped, ROWS, WEIGHTS), expected)
