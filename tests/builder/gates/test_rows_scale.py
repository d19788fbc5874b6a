"""Entropy of routing weights, and the scale that brings it about."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_moe_offload.builder.gates.rows import entropy, scale_for


def test_entropy_is_a_share_of_its_maximum():
    assert entropy(torch.zeros(3, 4)).tolist() == pytest.approx([1, 1, 1])
    assert entropy(torch.tensor([[100.0, 0, 0, 0]])).item() == pytest.approx(0, abs=1e-12)
    assert entropy(torch.tensor([[50.0, 50, 0, 0]])).item() == pytest.approx(0.5)
    assert entropy(torch.tensor([[0.0, 0, -100, -100]]), "sigmoid").item() == pytest.approx(0.5)
    assert entropy(torch.ones(2, 1)).tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 9),
    st.floats(0.05, 0.95),
    st.floats(1e-4, 1e4),
    st.integers(0, 1000),
    st.sampled_from(["softmax", "sigmoid"]),
)
def test_scaled_logits_have_the_target_entropy(num_experts, target, size, seed, scores):
    torch.manual_seed(seed)
    logits = torch.randn(50, num_experts, dtype=torch.float64)
    logits = (logits - logits.max(-1, keepdim=True).values - 0.5 * (scores == "sigmoid")) * size
    if scores == "softmax":
        logits = logits - logits.mean(-1, keepdim=True)
    scale = scale_for(logits, target, scores)
    assert scale is not None
    assert entropy(logits * scale, scores).mean().item() == pytest.approx(target, abs=1e-6)


def test_no_scale_sharpens_what_is_alike():
    assert scale_for(torch.ones(5, 3), 0.5) is None
    assert scale_for(torch.zeros(0, 3), 0.5) is None
    # Two of three experts always tie: their entropy is never below ln 2 / ln 3.
    tied = torch.tensor([[1.0, 1.0, 0.0]])
    assert scale_for(tied, 0.5) is None
    assert scale_for(tied, 0.7) == pytest.approx(4.5, rel=0.5)
