"""Every run and every setting sees the same tokens."""

import pytest
import torch

from transformers_moe_offload.bench.passage import OFFSET, Passage, passage_for, random_passage, text_passage
from transformers_moe_offload.errors import ConfigError


def test_the_sequences_of_a_batch_begin_at_different_places():
    passage = Passage(torch.arange(5000), is_text=True, source="numbers")
    found = passage.sequences(3, 4)
    assert found.tolist() == [[start + step for step in range(4)] for start in (0, OFFSET, 2 * OFFSET)]


def test_a_passage_begins_anew_where_it_ends():
    passage = Passage(torch.tensor([7, 8, 9]), is_text=True, source="numbers")
    assert passage.sequences(1, 7).tolist() == [[7, 8, 9, 7, 8, 9, 7]]


def test_random_tokens_never_end_a_sequence_and_are_the_same_each_time():
    passage = random_passage(vocab=5, avoid=frozenset({2}))
    assert set(passage.tokens.tolist()) == {0, 1, 3, 4}
    assert torch.equal(passage.tokens, random_passage(vocab=5, avoid=frozenset({2})).tokens)
    assert not passage.is_text


def test_a_model_with_a_tokenizer_is_measured_with_text(passage):
    assert passage.is_text
    assert len(passage.tokens) > 2048


def test_a_model_without_a_tokenizer_is_measured_with_random_tokens(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    passage = passage_for(model, str(tmp_path))
    assert not passage.is_text
    assert passage.tokens.max() < model.config.vocab_size
    assert model.generation_config.eos_token_id not in passage.tokens


def test_an_empty_text_is_an_error_that_names_it():
    def tokenizer(text, **options):
        return {"input_ids": []}

    with pytest.raises(ConfigError, match=r"notes\.txt has no text"):
        text_passage(tokenizer, "", "notes.txt")
