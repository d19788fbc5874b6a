"""Which text each recorded token belongs to, and where it stands in it."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hurried import run_at_once
from recorded import placed, read, texts_of
from transformers_moe_offload import UnsupportedModelError, routing
from transformers_moe_offload.hf.upstream import kv_cache_argument, kv_cache_parameter
from zoo.build import build

STORED = json.loads((Path(__file__).parent / "positions.json").read_text())
"""Two texts, the first padded on the left by two tokens, generated from prompts of five tokens: what was recorded."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("mixtral").eval()


def begin(model, ids):
    """Read some tokens; gives what the next forward is passed."""
    return kv_cache_argument(model, model(torch.tensor([ids]), use_cache=True))


def go_on(model, ids, past):
    return kv_cache_argument(model, model(torch.tensor([ids]), use_cache=True, **past))


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_generation_is_recorded_alike_under_every_version_of_transformers(model, cache):
    texts = torch.tensor(STORED["texts"])
    length, mask = STORED["prompt"], torch.tensor(STORED["mask"])
    with routing.record_routing(model) as recorder:
        model.generate(
            texts[:, :length],
            attention_mask=mask,
            max_new_tokens=texts.shape[1] - length,
            min_new_tokens=texts.shape[1] - length,
            do_sample=False,
            cache_implementation=cache,
            prefix_allowed_tokens_fn=lambda row, read: [int(texts[row, len(read)])],
        )
    (rows,) = recorder.trace.rows(0, padding=True)
    for name in ("token_ids", "sequence", "position", "is_padding"):
        assert getattr(rows, name).tolist() == STORED[name], name


def test_texts_that_are_read_in_turns_stay_apart(model):
    with routing.record_routing(model) as recorder, torch.no_grad():
        one = begin(model, [1, 2, 3])
        other = begin(model, [4, 5])
        one = go_on(model, [6], one)
        other = go_on(model, [7, 8], other)
        go_on(model, [9], one)
    assert texts_of(recorder.trace) == [placed([1, 2, 3, 6, 9]), placed([4, 5, 7, 8])]


def test_a_text_that_another_thread_goes_on_with_stays_one(model):
    with routing.record_routing(model) as recorder, torch.no_grad():
        past = begin(model, [1, 2, 3])
        run_at_once(lambda: torch.no_grad()(go_on)(model, [4, 5], past), [()])
    assert texts_of(recorder.trace) == [placed([1, 2, 3, 4, 5])]


def test_a_text_whose_beginning_was_not_recorded_begins_where_it_was_gone_on_with(model):
    with torch.no_grad():
        past = begin(model, [1, 2, 3])
        with routing.record_routing(model) as recorder:
            past = go_on(model, [4], past)
            copied = copy.deepcopy(past)  # a prefix that several prompts share
            go_on(model, [5], past)
            go_on(model, [6, 7], copied)
    assert texts_of(recorder.trace) == [placed([4, 5], 3), placed([6, 7], 4)]


def test_a_cache_that_is_passed_by_position_is_read(model):
    name = kv_cache_parameter(type(model).forward)
    with routing.record_routing(model) as recorder, torch.no_grad():
        past = begin(model, [1, 2, 3])
        model(torch.tensor([[4]]), None, None, past[name])
    assert texts_of(recorder.trace) == [placed([1, 2, 3, 4])]


def test_a_cache_that_cannot_be_read_is_refused_while_recording(model):
    class Foreign:
        """Holds a past that says nothing of itself."""

    given = {kv_cache_parameter(type(model).forward): Foreign()}
    with (
        routing.record_routing(model) as recorder,
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="of type Foreign, which is not a Cache"),
    ):
        model(torch.tensor([[1]]), use_cache=True, **given)
    assert recorder.trace.num_steps == 0
    with routing.record_routing(model) as recorder, torch.no_grad():  # and the model still works
        model(torch.tensor([[1, 2]]))
    assert texts_of(recorder.trace) == [placed([1, 2])]


def test_a_cache_that_does_not_tell_how_much_it_holds_is_refused_while_recording(model):
    class Silent(DynamicCache):
        def get_seq_length(self, layer_idx=0):
            raise ValueError("only LinearAttention layers")

    given = {kv_cache_parameter(type(model).forward): Silent(config=model.config)}
    with (
        routing.record_routing(model),
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="does not tell how many tokens"),
    ):
        model(torch.tensor([[1]]), use_cache=True, **given)


@pytest.mark.parametrize("router", [0, 1])
def test_repeat_rate_and_reuse_are_those_of_one_sequence(model, router):
    """Of a generation, whose tokens are read in several forwards, as of the same tokens read at once."""
    with routing.record_routing(model) as recorder, torch.no_grad():
        past = begin(model, [1, 2, 3, 4, 5])
        for token in (6, 7, 8):
            past = go_on(model, [token], past)
    with routing.record_routing(model) as whole, torch.no_grad():
        begin(model, [1, 2, 3, 4, 5, 6, 7, 8])
    rates = [one.trace.statistics(router).repeat_rate for one in (recorder, whole)]
    assert rates[0] == pytest.approx(rates[1])


def test_what_a_cache_forgets_is_not_read_twice_at_one_position(model):
    """As it forgets drafts that were rejected."""
    with routing.record_routing(model) as recorder, torch.no_grad():
        past = begin(model, [1, 2, 3])
        past = go_on(model, [4, 5, 6], past)
        (cache,) = past.values()
        cache.crop(-2)
        go_on(model, [7, 8], past)
    assert texts_of(recorder.trace) == [placed([1, 2, 3, 4, 5, 6]), placed([7, 8], first=4)]


def test_no_text_of_a_generation_with_drafts_has_two_tokens_at_one_position(model):
    prompt, length = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]]), 24
    with routing.record_routing(model) as recorder:
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        model.generate(prompt, prompt_lookup_num_tokens=3, **options)
    texts = texts_of(recorder.trace)
    assert len(texts) > 1, "no draft was rejected"
    for text in texts:
        first = text[0][1]
        assert [position for _, position in text] == list(range(first, first + len(text)))


def test_rows_of_a_cache_that_are_moved_are_followed_and_a_text_that_forks_goes_on_in_the_first_of_them(model):
    with routing.record_routing(model) as recorder, torch.no_grad():
        cache = read(model, [[1, 2], [3, 4]])
        cache.reorder_cache(torch.tensor([1, 0]))
        read(model, [[5], [6]], cache)
        cache.reorder_cache(torch.tensor([0, 0]))
        read(model, [[7], [8]], cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(repeats=2)
        read(model, [[9], [10]], cache)
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([1, 0]))
        read(model, [[11], [12]], cache)
    assert texts_of(recorder.trace) == [
        placed([1, 2, 6]),
        placed([3, 4, 5, 7]),
        placed([8, 9, 11], first=3),
        placed([10, 12], first=4),
    ]


def test_rows_that_were_moved_before_a_forward_that_failed_are_followed_after_it(model):
    def fail(*_):
        raise RuntimeError

    with routing.record_routing(model) as recorder, torch.no_grad():
        cache = read(model, [[1, 2], [3, 4]])
        cache.reorder_cache(torch.tensor([1, 0]))
        hook = model.model.embed_tokens.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            read(model, [[5], [6]], cache)
        hook.remove()
        read(model, [[5], [6]], cache)
    assert texts_of(recorder.trace) == [placed([1, 2, 6]), placed([3, 4, 5])]


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_texts_of_a_beam_search_are_what_its_beams_have_read(model, cache):
    prompt = torch.tensor([[1, 2, 3]])
    with routing.record_routing(model) as recorder:
        options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9, "cache_implementation": cache}
        found = model.generate(prompt, do_sample=False, min_new_tokens=9, **options).tolist()
    texts = texts_of(recorder.trace)
    assert len(texts) > 4, "no beam has forked"
    for text in texts:
        first = text[0][1]
        assert [position for _, position in text] == list(range(first, first + len(text)))
    # What was returned has been read but for its last token, in pieces of texts that follow one another.
    pairs = {(a, b) for text in texts for a, b in itertools.pairwise(text)}
    heads = {text[0] for text in texts}
    for tokens in found:
        steps = placed(tokens[:-1])
        assert all(pair in pairs or pair[1] in heads for pair in itertools.pairwise(steps))
    assert not hasattr(DynamicCache.reorder_cache, "__wrapped__"), "still listened to"


def test_an_encoder_that_is_called_after_an_interrupt_in_the_decoder_is_recorded():
    model = build("switch_transformers").eval()

    def interrupt(*_):
        raise KeyboardInterrupt

    with routing.record_routing(model) as recorder, torch.no_grad():
        hook = model.decoder.block[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[0]]))
        hook.remove()
        model.encoder(input_ids=torch.tensor([[1, 2, 3]]))
    assert [[token for token, _ in text] for text in texts_of(recorder.trace)] == [[1, 2, 3]]


def test_what_an_encoder_reads_again_beside_each_step_of_its_decoder_is_a_text_of_its_own():
    model, past = build("switch_transformers").eval(), {}
    encoded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with routing.record_routing(model) as recorder, torch.no_grad():
        for token in (0, 7, 8, 9):
            output = model(**encoded, decoder_input_ids=torch.tensor([[token]]), **past)
            past = kv_cache_argument(model, output)
    of_encoder, of_decoder = (texts_of(recorder.trace, router) for router in (0, len(recorder.trace.routers) - 1))
    assert of_encoder == [placed([5, 6])] * 4
    assert of_decoder == [placed([0, 7, 8, 9])]


def test_a_decoder_that_is_given_embeddings_has_no_tokens_and_not_its_encoders():
    model = build("switch_transformers").eval()
    ids = torch.tensor([[5, 6, 7]])
    with routing.record_routing(model) as recorder, torch.no_grad():
        model(input_ids=ids, decoder_inputs_embeds=model.get_input_embeddings()(ids))
    of_encoder, of_decoder = (texts_of(recorder.trace, router) for router in (0, len(recorder.trace.routers) - 1))
    assert of_encoder == [placed([5, 6, 7])]
    assert of_decoder == [[(-1, -1)] * 3]
