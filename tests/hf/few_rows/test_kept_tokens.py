"""A cache holds what Transformers' own would hold, though tokens are written behind those that are there."""

import copy

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from transformers_moe_offload.hf.few_rows import kept_tokens
from transformers_moe_offload.hf.few_rows.kept_tokens import extended


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    monkeypatch.setattr(kept_tokens, "FEW_BYTES", 0)
    monkeypatch.setattr(kept_tokens, "LEAST_ROOM", 3)


def tokens(count, seed, texts=2):
    """Keys and values of some tokens."""
    return torch.randn(2, texts, 4, count, 8, generator=torch.Generator().manual_seed(seed)).unbind()


def filled(count=5, texts=2):
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*tokens(count, layer, texts), layer)
    return cache


def grow(cache, put, seeds, texts=2):
    for seed in seeds:
        for layer in range(2):
            keys, values = put(cache, *tokens(1, 100 * seed + layer, texts), layer)
            assert keys is cache.layers[layer].keys
            assert values is cache.layers[layer].values


own = DynamicCache.update


def held(cache):
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def are_equal(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_steps_put_in_what_the_cache_itself_would():
    ours, theirs = filled(), filled()
    for seed in range(20):
        grow(ours, extended, [seed])
        grow(theirs, own, [seed])
        assert are_equal(held(ours), held(theirs))
    assert ours.get_seq_length() == 25


def test_most_steps_copy_nothing_that_is_there():
    cache, places = filled(64), []
    for seed in range(24):
        grow(cache, extended, [seed])
        places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places)) == 3


CHANGES = {
    "cropped": lambda cache: cache.crop(-3),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "emptied": lambda cache: cache.reset(),
    "given other data": lambda cache: _turn_round(cache),
    "extended by its own update": lambda cache: grow(cache, own, [50]),
}


def _turn_round(cache):
    for layer in cache.layers:
        layer.keys.data = layer.keys.data.flip(2)


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_was_done_to_a_cache_in_between_holds(change):
    ours, theirs = filled(), filled()
    for cache, put in ((ours, extended), (theirs, own)):
        grow(cache, put, [1, 2])
        change(cache)
        texts = len(cache.layers[0].keys) if cache.layers[0].is_initialized else 2
        grow(cache, put, [3, 4], texts)
    assert are_equal(held(ours), held(theirs))


def test_tokens_that_others_hold_are_not_written_over():
    cache = filled()
    grow(cache, extended, [1, 2])
    [first, *_], before = [layer.keys for layer in cache.layers], held(cache)
    kept = first.clone()
    cache.crop(-2)
    grow(cache, extended, [3, 4])
    assert torch.equal(first, kept)
    assert not are_equal(held(cache), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: _with_layers_copied(cache)], ids=["deep", "of layers"])
def test_two_caches_that_go_on_from_one_do_not_disturb_each_other(copied):
    one = filled()
    grow(one, extended, [1])
    other = copied(one)
    grow(one, extended, [2])
    grow(other, extended, [3])
    for cache, seeds in ((one, [1, 2]), (other, [1, 3])):
        expected = filled()
        grow(expected, own, seeds)
        assert are_equal(held(cache), held(expected))


def _with_layers_copied(cache):
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def test_steps_with_and_without_inference_mode_follow_each_other():
    cache, expected = filled(), filled()
    for seed, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]):
        with mode():
            grow(cache, extended, [seed])
        grow(expected, own, [seed])
    assert are_equal(held(cache), held(expected))


def test_a_cache_with_an_update_of_its_own_is_asked():
    class Counting(DynamicCache):
        count = 0

        def update(self, *args, **kwargs):
            self.count += 1
            return super().update(*args, **kwargs)

    cache = Counting()
    cache.update(*tokens(5, 0), 0)
    extended(cache, *tokens(1, 1), 0)
    assert cache.count == 2


def put_in_place_of(owner, monkeypatch):
    """Replace `update` by one that counts calls."""
    calls, update = [], owner.update

    def counting(*args, **kwargs):
        calls.append(args)
        return update(*args, **kwargs)

    monkeypatch.setattr(owner, "update", counting)
    return calls


@pytest.mark.parametrize("owner", [Cache, DynamicLayer, None], ids=["caches", "layers", "one cache"])
def test_an_update_that_was_put_in_place_of_the_own_one_is_asked(owner, monkeypatch):
    cache = filled()
    calls = put_in_place_of(owner or cache, monkeypatch)
    grow(cache, extended, [1, 2])
    assert len(calls) == 4


def test_gradients_of_what_was_computed_with_held_tokens_survive_a_step():
    cache = filled()
    with torch.no_grad():
        grow(cache, extended, [1])
    keys = cache.layers[0].keys
    weight = torch.ones_like(keys, requires_grad=True)
    total = (weight * keys).sum()
    with torch.no_grad():
        grow(cache, extended, [2])
    total.backward()
    assert torch.equal(weight.grad, keys)


def test_short_texts_are_left_to_the_cache(monkeypatch):
    monkeypatch.setattr(kept_tokens, "FEW_BYTES", 1 << 20)
    cache = filled()
    grow(cache, extended, [1])
    assert cache.layers[0].keys.is_contiguous()
