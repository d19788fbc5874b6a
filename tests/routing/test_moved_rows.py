"""What becomes of a recording's texts while rows of a KV cache are moved, or tokens are forgotten, between forwards."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from recorded import placed, read, texts_of
from transformers_moe_offload import routing
from transformers_moe_offload.hf.upstream import kv_cache_parameter
from transformers_moe_offload.routing import RoutingTrace
from zoo.build import build


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("mixtral").eval()


def read_embeddings(model, rows, past):
    embeddings = model.get_input_embeddings()(torch.tensor(rows))
    model(inputs_embeds=embeddings, **{kv_cache_parameter(type(model).forward): past})


ONE, OTHER = [1, 2], [3, 4]
KEPT = [placed([*ONE, 5]), placed([*OTHER, 6])]
REPEATED = [placed([*ONE, 5]), placed([*OTHER, 7]), placed([6], first=2), placed([8], first=2)]


@pytest.mark.parametrize(
    ("method", "how", "texts"),
    [
        ("batch_select_indices", torch.tensor([True, True]), KEPT),
        ("batch_select_indices", np.array([True, True]), KEPT),
        ("batch_select_indices", torch.tensor([False, True]), [placed(ONE), placed([*OTHER, 5])]),
        ("batch_select_indices", torch.tensor([-1]), [placed(ONE), placed([*OTHER, 5])]),
        ("batch_select_indices", [1], [placed(ONE), placed([*OTHER, 5])]),
        ("batch_select_indices", slice(0, 1), [placed([*ONE, 5]), placed(OTHER)]),
        ("batch_repeat_interleave", torch.tensor([1, 1]), KEPT),
        ("batch_repeat_interleave", torch.tensor([0, 1]), [placed(ONE), placed([*OTHER, 5])]),
        ("batch_repeat_interleave", 2, REPEATED),
        ("batch_repeat_interleave", torch.tensor(2), REPEATED),
        ("batch_repeat_interleave", np.int64(2), REPEATED),
    ],
)
def test_rows_are_followed_however_a_cache_may_be_told_to_move_them(model, method, how, texts):
    with routing.record_routing(model) as recorder, torch.no_grad():
        cache = read(model, [ONE, OTHER])
        getattr(cache, method)(how)
        read(model, [[5 + row] for row in range(len(cache.layers[0].keys))], cache)
    assert texts_of(recorder.trace) == texts


def test_places_that_the_caller_overwrites_are_followed_as_they_were(model):
    places = torch.tensor([1, 0])
    with routing.record_routing(model) as recorder, torch.no_grad():
        cache = read(model, [ONE, OTHER])
        cache.reorder_cache(places)
        places.zero_()
        read(model, [[5], [6]], cache)
    assert texts_of(recorder.trace) == [placed([*ONE, 6]), placed([*OTHER, 5])]


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("reorder_cache", torch.tensor([3, 2])),
        ("batch_select_indices", torch.tensor([True, False, True, False])),
        ("batch_repeat_interleave", torch.tensor([1, 0, 1, 0])),
    ],
)
def test_rows_that_a_recording_has_not_seen_begin_texts_and_lose_none(model, tmp_path, method, how):
    """A cache that is made larger without its methods."""
    with routing.record_routing(model, tmp_path / "trace") as recorder, torch.no_grad():
        cache = read(model, [ONE, OTHER])
        for layer in cache.layers:
            layer.batch_repeat_interleave(2)
        getattr(cache, method)(how)
        read(model, [[5], [6]], cache)
    texts = [placed(ONE), placed(OTHER), placed([5], first=2), placed([6], first=2)]
    assert texts_of(recorder.trace) == texts_of(RoutingTrace.load(tmp_path / "trace")) == texts


def test_rows_that_are_moved_before_embeddings_are_followed_behind_them(model):
    with routing.record_routing(model) as recorder, torch.no_grad():
        cache = read(model, [ONE, OTHER])
        cache.reorder_cache(torch.tensor([1, 0]))
        read_embeddings(model, [[9], [9]], cache)
        read(model, [[5], [6]], cache)
    texts = texts_of(recorder.trace)
    assert placed(ONE) + placed([6], first=3) in texts
    assert placed(OTHER) + placed([5], first=3) in texts


def read_and_fail(model, rows, past):
    """Fails once the cache has been filled."""
    hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, rows, past)
    hook.remove()


def read_with_another(model, rows, past):
    read(copy.deepcopy(model), rows, past)


FILLINGS = pytest.mark.parametrize("fill", [read, read_embeddings, read_and_fail, read_with_another])


def cropped(cache):
    cache.crop(-2)


def emptied(cache):
    cache.reset()


def cropped_layers(cache):
    for layer in cache.layers:
        layer.crop(-2)


@FILLINGS
@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@pytest.mark.parametrize("forget", [cropped, cropped_layers, emptied])
def test_no_text_goes_on_over_tokens_that_its_cache_has_forgotten(model, fill, make, forget):
    if forget is cropped_layers and fill is read_with_another:
        pytest.skip("neither the cache nor a forward of this model shows it")
    cache = make() if make is DynamicCache else make(config=model.config, max_cache_len=16)
    if make is StaticCache and forget is not emptied and not cache.is_croppable:
        pytest.skip("static caches of Transformers 5.23 cannot be cropped")
    with routing.record_routing(model) as recorder, torch.no_grad():
        read(model, [[1, 2, 3]], cache)
        forget(cache)
        fill(model, [[7, 8, 9]], cache)
        before = int(cache.get_seq_length())
        read(model, [[4]], cache)
    first, *_, last = texts_of(recorder.trace)
    assert first == placed([1, 2, 3])
    assert last[-1] == (4, before)
    assert last in (placed([4], first=before), placed([7, 8, 9, 4], first=before - 3))


@FILLINGS
def test_a_text_goes_on_behind_tokens_that_were_read_and_forgotten_after_it(model, fill):
    with routing.record_routing(model) as recorder, torch.no_grad():
        cache = read(model, [[1, 2, 3]])
        if fill is not read:
            fill(model, [[7, 8]], cache)
            cache.crop(-2)
        read(model, [[4]], cache)
    assert placed([1, 2, 3, 4]) in texts_of(recorder.trace)


def test_methods_of_caches_are_as_before_once_a_recording_is_over(model):
    before = {name: vars(kind).get(name) for kind in (DynamicCache, DynamicCache.__base__) for name in vars(kind)}
    with routing.record_routing(model):
        pass
    assert before == {
        name: vars(kind).get(name) for kind in (DynamicCache, DynamicCache.__base__) for name in vars(kind)
    }
