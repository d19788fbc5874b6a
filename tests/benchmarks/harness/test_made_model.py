"""A made model with popular experts routes as it says: some are chosen far more often than others."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM


def loads_of(script, folder, popularity):
    """How often each expert of each layer is chosen by random tokens, sorted, most chosen first."""
    shapes = script("harness.shape")
    shape = replace(shapes.QUICK, hidden=256, experts=16, popularity=popularity)
    model = AutoModelForCausalLM.from_pretrained(script("harness.make_model").made_model(shape, folder))
    tokens = torch.randint(shape.vocab, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model(tokens, output_router_logits=True).router_logits
    chosen = [layer.topk(shape.experts_per_token, -1).indices.flatten() for layer in scores]
    counts = torch.stack([torch.bincount(layer, minlength=shape.experts) for layer in chosen])
    return counts.sort(descending=True).values / counts.sum(1, keepdim=True)


def test_popularity_makes_routers_prefer_some_experts(script, tmp_path):
    uniform, popular = (loads_of(script, tmp_path, popularity) for popularity in (0.0, 1.0))
    top_quarter = slice(0, 4)
    assert uniform[:, top_quarter].sum(1).max() < 0.45
    assert popular[:, top_quarter].sum(1).min() > 0.5


def test_models_of_different_popularity_are_kept_apart(script):
    shapes = script("harness.shape")
    assert shapes.OLMOE.name != replace(shapes.OLMOE, popularity=0.0).name
    assert (shapes.OLMOE.experts, shapes.OLMOE.experts_per_token, shapes.OLMOE.layers) == (64, 8, 16)
    assert shapes.OLMOE.all_expert_bytes >= 10**9
