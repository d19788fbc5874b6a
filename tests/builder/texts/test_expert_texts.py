"""Text from prompts, files, JSON lines and data sets; windows that count what they should."""

import json
import sys

import pytest
import torch

from transformers_moe_offload.builder.recipe import Dataset, Expert, Origin
from transformers_moe_offload.builder.texts.expert_texts import Texts, read_dataset
from transformers_moe_offload.builder.texts.windows import MAX_WINDOW_TOKENS, SAMPLED_TOKENS, windows_of
from transformers_moe_offload.errors import RecipeError


def texts_from(path, **fields):
    return list(read_dataset(Dataset(path=str(path), **fields)))


def test_a_text_file_comes_in_pieces_that_make_it_up(tmp_path):
    text = "".join(f"line {number} of many\n" for number in range(5000))
    (tmp_path / "a.txt").write_text(text)
    pieces = texts_from(tmp_path / "a.txt")
    assert len(pieces) > 3
    assert "".join(pieces) == text


def test_json_lines_give_one_column(tmp_path):
    rows = [{"text": "one", "other": 1}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert texts_from(tmp_path / "a.jsonl") == ["one", "two"]
    with pytest.raises(
        RecipeError, match=r"a\.jsonl, line 1 has no text in column 'body' but text, other; set dataset\.text"
    ):
        texts_from(tmp_path / "a.jsonl", text="body")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(RecipeError, match=r"broken\.jsonl, line 1 is not valid JSON"):
        texts_from(tmp_path / "broken.jsonl")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the text file .*absent\.txt"):
        texts_from(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the text file"):
        texts_from(tmp_path / "binary.txt")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecipeError, match="neither text nor JSON lines"):
        texts_from(tmp_path / "a.parquet")


def test_a_data_set_is_read_by_its_library(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"body": f"text {n}"}) for n in range(5)))
    assert texts_from(tmp_path / "set", text="body", split="train[:2]") == ["text 0", "text 1"]
    with pytest.raises(RecipeError, match=r"has no text in column 'text' but body"):
        texts_from(tmp_path / "set")
    with pytest.raises(RecipeError, match=r"cannot load dataset .*, split 'no such'"):
        texts_from(tmp_path / "set", split="no such")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'transformers-moe-offload\[datasets\]'"):
        texts_from("me/some-texts")


def test_experts_without_a_name_are_called_after_their_source():
    experts = [Expert(), Expert(name="a"), Expert(source=Origin(model="me/code"))]
    names = [Texts.of(expert, number).name for number, expert in enumerate(experts)]
    assert names == ["expert 0", "a", "me/code"]


@pytest.mark.parametrize("skip_bos", [True, False])
def test_windows_count_every_token_once_and_no_pads(tokenizer, skip_bos):
    prompts = ("short", "a much longer text than the first one " * 100)
    sizes = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    windows = windows_of(
        [Texts("a", prompts), Texts("b", ("b",), ("not b",))], tokenizer, length=100, skip_bos=skip_bos
    )

    starts = [-(-size // 99) for size in sizes]  # each window begins with its own first token
    assert windows.counts[0] == sum(sizes) + (0 if skip_bos else sum(starts))
    assert windows.counts[1] == 0
    counted = [0] * 4
    for batch in windows.batches:
        assert batch.tokens.shape[1] <= 100
        assert (batch.tokens[:, 0] == tokenizer.bos_token_id).all()
        for row, number in enumerate(batch.lists.tolist()):
            counted[number] += int(batch.counted[row].sum())
            assert bool(batch.counted[row, 0]) is not skip_bos
        assert not (batch.sampled & ~batch.counted).any()
        assert not batch.sampled[batch.lists % 2 == 1].any(), "negative texts have no home"
    assert counted == list(windows.counts)


def test_samples_are_spread_over_all_of_a_text(tokenizer):
    text = " ".join(str(number) for number in range(3000))
    windows = windows_of([Texts("a", (text,))], tokenizer, length=MAX_WINDOW_TOKENS, skip_bos=True)
    assert windows.counts[0] > 2 * SAMPLED_TOKENS
    assert windows.sampled == SAMPLED_TOKENS
    share = SAMPLED_TOKENS / windows.counts[0]
    for batch in windows.batches:
        rows = batch.counted.sum(1)
        torch.testing.assert_close(batch.sampled.sum(1).float(), rows * share, atol=1, rtol=0)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(RecipeError, match="has no tokenizer"):
        windows_of([Texts("a", ("text",))], None, length=8, skip_bos=True)
