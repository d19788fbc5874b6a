"""Of a model's folder only what is meant to go along does, and nothing that lies outside of it."""

import json
import re
from pathlib import Path

import pytest
import transformers

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hub.fetch import companions_in, fetch_small, is_tokenizer_file, published


def names(folder) -> list[str]:
    return [file.name for file in companions_in(folder)]


def test_what_a_tokenizer_of_transformers_is_made_of_goes_along():
    sources = (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py")
    literals = [re.findall(r"VOCAB_FILES_NAMES = \{([^}]*)\}", source.read_text("utf-8")) for source in sources]
    files = {name for found in literals for text in found for name in re.findall(r': "([\w.-]+)"', text)}
    assert {"tokenizer.json", "vocab.txt", "spiece.model"} <= files
    assert sorted(name for name in files if not is_tokenizer_file(name)) == []


def test_secrets_and_notes_stay_where_they_are(tmp_path):
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt"]
    for name in [*kept, "credentials.json", "passwords.txt", ".env", "config.json", "notes.txt", "id_rsa", "x.model"]:
        (tmp_path / name).write_text("{}")
    assert names(tmp_path) == kept


@pytest.mark.parametrize("name", ["vocab.txt", "LICENSE", "README.md"])
def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path, name):
    (tmp_path / "token").write_text("hf_secret")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / name).symlink_to("../token")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is a link that leads out of .*replace the link"):
        fetch_small(str(folder), {})


def test_a_link_that_stays_in_the_folder_is_followed(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("as you like")
    (tmp_path / "LICENSE").symlink_to("LICENSE.txt")
    assert names(tmp_path) == ["LICENSE", "LICENSE.txt"]


def test_a_folder_that_is_itself_a_link_is_the_folder_that_was_named(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "current").symlink_to(folder, target_is_directory=True)
    assert names(tmp_path / "current") == ["tokenizer.json"]


def test_the_links_of_the_cache_of_the_hub_are_followed_as_far_as_its_blobs(tmp_path):
    repository = tmp_path / "models--me--model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "77").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/77")
    assert names(snapshot) == ["tokenizer.json"]
    (tmp_path / "token").write_text("hf_secret")
    (snapshot / "vocab.txt").symlink_to("../../../token")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link that leads out"):
        names(snapshot)


def test_code_to_run_and_places_on_this_machine_are_not_published(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(
        json.dumps(
            {
                "auto_map": {"AutoTokenizer": ["somebody/code--tokenization.Tokenizer", None]},
                "bos_token": "<s>",
                "name_or_path": "/home/me/models/secret",
                "tokenizer_file": "C:\\Users\\me\\tokenizer.json",
            }
        )
    )
    assert json.loads(published(file)) == {"bos_token": "<s>"}


def test_what_has_nothing_of_the_sort_is_published_byte_for_byte(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    file.write_bytes(b'{"name_or_path":  "org/model", "unk_token": "\xc3\xbc"}')
    assert published(file) == file.read_bytes()


def test_a_vocabulary_is_published_whatever_its_words_are(tmp_path):
    file = tmp_path / "vocab.json"
    file.write_text('{"auto_map": 1, "name_or_path": 2}')
    assert published(file) == file.read_bytes()
