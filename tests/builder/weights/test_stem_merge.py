"""Merged tensors against formulas written down a second time, element by element, and against PEFT."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import ties

from transformers_moe_offload.builder.recipe import Stem
from transformers_moe_offload.builder.weights import stem_merge
from transformers_moe_offload.builder.weights.stem_merge import merged
from transformers_moe_offload.errors import RecipeError


def tensors(count: int, shape=(23, 17), seed: int = 0, dtype=torch.float32):
    """A base and some tunes of it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tunes = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    return base.to(dtype), [tune.to(dtype) for tune in tunes]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a small tensor is merged in several parts, too."""
    monkeypatch.setattr(stem_merge, "_BLOCK", 100)


def ties_by_hand(base, others, density, weight):
    """Algorithm 1 of arXiv 2306.01708 for one tensor, in Python numbers."""
    kept = max(1, int(density * base.numel()))
    trimmed = []
    for other in others:
        difference = (other.float() - base.float()).flatten().tolist()
        least = sorted(map(abs, difference), reverse=True)[kept - 1]
        trimmed.append([value if abs(value) >= least else 0.0 for value in difference])
    found = []
    for plain, values in zip(base.float().flatten().tolist(), zip(*trimmed, strict=True), strict=True):
        total = sum(values)
        agreeing = [value for value in values if value * total > 0]
        found.append(plain + weight * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return torch.tensor(found, dtype=torch.float64).reshape(base.shape)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ties_is_what_the_paper_says(count, density):
    base, others = tensors(count)
    found = merged(Stem(method="ties", density=density, weight=0.7), base, others, "w")
    assert (found.double() - ties_by_hand(base, others, density, 0.7)).abs().max() < 1e-6


def test_ties_is_peft_s():
    base, others = tensors(3, shape=(40, 10))
    differences = [other - base for other in others]
    expected = base + ties(differences, torch.ones(3), density=0.25)
    assert torch.allclose(merged(Stem(method="ties", density=0.25), base, others, "w"), expected, atol=1e-6)


@given(
    st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=300),
    st.floats(0.001, 1),
)
def test_trimming_keeps_what_sorting_would(values, density):
    base, other = torch.zeros(len(values)), torch.tensor(values)
    kept = max(1, int(density * len(values)))
    least = sorted(map(abs, values), reverse=True)[kept - 1]
    found = merged(Stem(method="ties", density=density), base, [other], "w")
    assert torch.equal(found, torch.where(other.abs() >= least, other, 0))


def test_an_average_is_the_mean_of_the_models():
    base, others = tensors(3)
    found = merged(Stem(method="average"), base, others, "w")
    assert torch.allclose(found, torch.stack(others).mean(0), atol=1e-6)
    half_way = merged(Stem(method="average", weight=0.5), base, others, "w")
    assert torch.allclose(half_way, (base + torch.stack(others).mean(0)) / 2, atol=1e-6)


def test_dare_drops_the_given_share_and_rescales_the_rest():
    base, (other,) = tensors(1, shape=(300, 300))
    difference = merged(Stem(method="dare", density=0.25), base, [other], "w") - base
    is_kept = difference != 0
    assert is_kept.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(difference[is_kept], 4 * (other - base)[is_kept], atol=1e-5)


def test_dare_averages_what_each_model_alone_would_give():
    base, others = tensors(2)
    recipe = Stem(method="dare", density=0.5)
    both = merged(recipe, base, others, "w") - base
    first = merged(recipe, base, [others[0], base], "w") - base
    second = merged(recipe, base, [base, others[1]], "w") - base
    assert torch.allclose(both, first + second, atol=1e-6)


def test_dare_keeps_everything_at_density_1():
    base, others = tensors(3)
    average = merged(Stem(method="average"), base, others, "w")
    assert torch.equal(merged(Stem(method="dare", density=1.0), base, others, "w"), average)


def test_what_dare_drops_depends_on_the_seed_the_name_and_the_model_and_on_nothing_else():
    base, (other,) = tensors(1)

    def dropped(name="w", seed=0, others=(other,)):
        return merged(Stem(method="dare", seed=seed), base, others, name) == base

    expected = dropped()
    torch.manual_seed(123)
    _ = torch.rand(5), dropped("v")
    assert torch.equal(dropped(), expected)
    assert not torch.equal(dropped("v"), expected)
    assert not torch.equal(dropped(seed=1), expected)
    assert not torch.equal(dropped(others=(base, other)), expected)


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_that_do_not_differ_from_the_base_give_the_base_in_its_dtype(method, dtype):
    base, _ = tensors(0, dtype=dtype)
    found = merged(Stem(method=method), base, [base.clone(), base.clone()], "w")
    assert found.dtype == dtype
    assert torch.equal(found, base)


def test_blocks_leave_no_trace(monkeypatch):
    base, others = tensors(3)
    in_parts = [merged(Stem(method=method), base, others, "w") for method in ("average", "ties", "dare")]
    monkeypatch.setattr(stem_merge, "_BLOCK", 10**6)
    at_once = [merged(Stem(method=method), base, others, "w") for method in ("average", "ties", "dare")]
    assert all(map(torch.equal, in_parts, at_once))


def test_the_stem_of_the_base_is_the_base():
    base, others = tensors(2)
    assert merged(Stem(), base, others, "w") is base


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_tensors_of_two_shapes_are_refused_with_both(method):
    base, others = tensors(1)
    with pytest.raises(RecipeError, match=r"lm_head.* is \[23, 17\] in the base model and \[22, 17\] in model 2"):
        merged(Stem(method=method), base, [*others, others[0][1:]], "lm_head.weight")


def test_whole_numbers_are_not_averaged():
    ids = torch.arange(4)
    assert merged(Stem(method="average"), ids, [ids.clone()], "ids") is ids
    with pytest.raises(RecipeError, match=r"ids holds torch\.int64 that differ"):
        merged(Stem(method="average"), ids, [ids + 1], "ids")
