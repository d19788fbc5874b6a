"""Channels of a block dealt out to its parts: each to one, evenly, and alike ones together."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, silu
from transformers import AutoTokenizer

from dense import ModelSource, dense_model, ffn_paths
from transformers_moe_offload.builder.channel_split import (
    active,
    channels_of,
    co_activation_parts,
    k_means_parts,
    random_parts,
    sizes_of,
)
from transformers_moe_offload.builder.recipe import Dataset, Split
from transformers_moe_offload.errors import RecipeError

TINY_DENSE = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"


def parts_by(method, num_channels, num_parts, seed, num_shared=0):
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return random_parts(num_channels, num_parts, seed=seed)
    if method == "co_activation":
        seen = torch.rand(30, num_channels, generator=generator) < 0.2
        return co_activation_parts(seen, num_parts, num_shared=num_shared, seed=seed)
    return k_means_parts(torch.randn(num_channels, 5, generator=generator), num_parts, seed=seed)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["random", "k_means", "co_activation"]),
    st.integers(1, 8),
    st.integers(0, 30),
    st.integers(0, 99),
    st.data(),
)
def test_every_channel_is_in_one_part_and_parts_are_even(method, num_parts, more, seed, data):
    num_channels = num_parts + more
    num_shared = data.draw(st.integers(0, num_parts - 1))
    parts = parts_by(method, num_channels, num_parts, seed, num_shared)
    assert torch.equal(torch.cat(list(parts)).sort().values, torch.arange(num_channels))
    assert [len(part) for part in parts] == sizes_of(num_channels, num_parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(torch.equal(part, part.sort().values) for part in parts)
    again = parts_by(method, num_channels, num_parts, seed, num_shared)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("method", ["random", "k_means", "co_activation"])
def test_the_parts_add_up_to_the_block(method):
    torch.manual_seed(0)
    gate, up, down, x = torch.randn(22, 6), torch.randn(22, 6), torch.randn(6, 22), torch.randn(9, 6)
    whole = linear(silu(linear(x, gate)) * linear(x, up), down)
    parts = parts_by(method, 22, 4, seed=0)
    total = sum(linear(silu(linear(x, gate[part])) * linear(x, up[part]), down[:, part]) for part in parts)
    torch.testing.assert_close(total, whole)


def test_k_means_finds_groups_that_are_there():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) * 3
    group = torch.arange(40) % 4
    parts = k_means_parts(centres[group] + 0.1 * torch.randn(40, 16, generator=generator), 4, seed=1)
    assert sorted(group[part].unique().tolist() for part in parts) == [[0], [1], [2], [3]]


def test_k_means_copes_with_rows_that_are_all_the_same():
    parts = k_means_parts(torch.ones(7, 3), 3, seed=0)
    assert [len(part) for part in parts] == [3, 2, 2]


def test_channels_that_are_active_together_go_together():
    group = torch.arange(24) % 3
    tokens = torch.arange(60) % 3
    activations = (tokens[:, None] == group).float() * 5 + torch.rand(
        60, 24, generator=torch.Generator().manual_seed(0)
    )
    parts = co_activation_parts(active(activations), 3, seed=0)
    assert sorted(group[part].unique().tolist() for part in parts) == [[0], [1], [2]]
    # A channel that is always active belongs to what every token visits.
    activations[:, [5, 7]] = 10
    shared = co_activation_parts(active(activations), 12, num_shared=1, seed=0)[0]
    assert shared.tolist() == [5, 7]


def test_a_block_is_not_split_finer_than_its_channels():
    with pytest.raises(RecipeError, match="a block of 3 channels cannot be split into 4 parts"):
        random_parts(3, 4, seed=0)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
@pytest.mark.parametrize("method", ["random", "k_means", "co_activation"])
def test_a_recipe_gives_the_parts_of_every_layer(method, family, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text that says which channels are active together. " * 10)
    tokenizer = AutoTokenizer.from_pretrained(TINY_DENSE)
    source = ModelSource(dense_model(family, vocab_size=4096))
    split = Split(num_experts=6, shared=1, method=method, dataset=Dataset(path=str(text)))
    chosen = channels_of(split, source, tokenizer, ffn_paths(family))
    of_layers = [chosen(layer) for layer in range(4)]
    for parts in of_layers:
        assert torch.equal(torch.cat(list(parts)).sort().values, torch.arange(48))
        assert [len(part) for part in parts] == [8] * 6
    assert not torch.equal(of_layers[0][0], of_layers[1][0]), "layers are split on their own"


def test_co_activation_needs_text():
    with pytest.raises(RecipeError, match=r"set split\.dataset, or another method"):
        channels_of(Split(method="co_activation"), ModelSource(dense_model()), None, ffn_paths())
