"""Rows that hold several texts are refused, and rows that hold one are not."""

import pytest
import torch

from recorded import placed, texts_of
from transformers_moe_offload import UnsupportedModelError, routing
from transformers_moe_offload.routing.padding import expect_texts_apart, padding_of
from zoo.build import build

TWO_TEXTS = torch.tensor([[0, 1, 0, 1]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("mixtral").eval()


def test_several_texts_in_one_row_are_refused_while_recording(model):
    packed = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with (
        routing.record_routing(model) as recorder,
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="position_ids of row 0 begin again within it"),
    ):
        model(**packed)
    with torch.no_grad():
        model(**packed)
    with routing.record_routing(model) as recorder, torch.no_grad():
        padded = torch.tensor([[1, 1, 0, 1, 2]])
        model(packed["input_ids"], position_ids=padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    assert texts_of(recorder.trace) == [placed([3, 4, 5], first=2)]


def test_positions_that_are_broadcast_to_a_batch_are_looked_at(model):
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with (
        routing.record_routing(model),
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="position_ids of row 0 begin again within it"),
    ):
        model(ids, position_ids=TWO_TEXTS, use_cache=False)


def test_positions_of_the_text_are_looked_at_where_those_of_images_go_along():
    model, ids = build("qwen3_vl_moe").eval(), torch.tensor([[5, 6, 7, 8]])
    with routing.record_routing(model) as recorder, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="position_ids of row 0 begin again within it"):
            model(input_ids=ids, position_ids=TWO_TEXTS.expand(4, 1, 4), use_cache=False)
        model(input_ids=ids, position_ids=torch.arange(4).expand(4, 1, 4), use_cache=False)
    assert texts_of(recorder.trace) == [placed([5, 6, 7, 8])]


IMAGE = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
"""A token, an image of two by two, and a token, in time, height and width."""
VIDEO = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 1, 1, 3], [0, 1, 2, 1, 2, 3]])
"""The same with two frames of one by two at one time."""


@pytest.mark.parametrize("places", [IMAGE, VIDEO])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_image_within_a_text_is_not_another_text(places, batch):
    shape = torch.Size((batch, 6))
    expect_texts_apart(places[:, None], None, shape)
    expect_texts_apart(torch.cat([torch.arange(6)[None], places])[:, None].expand(4, batch, 6), None, shape)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (3, 1, 4), (3, 2, 4), (4, 2, 4)])
def test_positions_that_begin_again_are_refused_in_every_form(shape):
    with pytest.raises(UnsupportedModelError, match="begin again"):
        expect_texts_apart(TWO_TEXTS[0].expand(shape), None, torch.Size((2, 4)))


def test_texts_of_one_token_each_are_refused():
    with pytest.raises(UnsupportedModelError, match="begin again"):
        expect_texts_apart(torch.zeros(3, 1, 4), None, torch.Size((1, 4)))


BLOCKS = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(2, 2).tril()).bool()[None, None]
CAUSAL = torch.ones(4, 4).tril().bool()[None, None]


def added(mask):
    """As what is added to scores."""
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [torch.clone, added])
def test_a_mask_that_keeps_tokens_of_a_row_apart_is_refused_and_a_causal_one_is_not(model, form):
    ids = torch.tensor([[1, 2, 3, 4]])
    with routing.record_routing(model) as recorder, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="attention_mask of row 0 keeps its tokens apart"):
            model(ids, attention_mask=form(BLOCKS), use_cache=False)
        model(ids, attention_mask=form(CAUSAL), use_cache=False)
    assert texts_of(recorder.trace) == [placed([1, 2, 3, 4])]


def test_masks_of_windows_of_padding_and_of_static_caches_keep_nothing_apart():
    window = CAUSAL & ~torch.ones(4, 4).tril(-2).bool()
    assert not padding_of(window, 1, 4, before=0).any()
    padded = CAUSAL & torch.tensor([False, False, True, True])
    assert padding_of(padded, 1, 4, before=0).tolist() == [[True, True, False, False]]
    static = torch.cat([torch.ones(1, 1, 4, 3).bool(), CAUSAL, torch.zeros(1, 1, 4, 5).bool()], dim=-1)
    assert not padding_of(static, 2, 4, before=3).any()


def test_attention_in_chunks_beside_full_attention_keeps_nothing_apart():
    assert not padding_of({"chunked_attention": BLOCKS, "full_attention": CAUSAL}, 1, 4, before=0).any()
