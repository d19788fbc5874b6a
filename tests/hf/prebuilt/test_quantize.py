"""`quantize_checkpoint` writes what loads, tells how large it is, is resumed, and refuses in Python's terms."""

import re

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import transformers_moe_offload as tmo
from builder.made import save_dense
from transformers_moe_offload import CheckpointError, ConfigError, ExpertFormats, HqqFormat, UnsupportedModelError
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.tensor_files.index import read_index
from transformers_moe_offload.tracing import RecordedVisit, Trace
from zoo.build import build

from .made import files

FOUR = HqqFormat(nbits=4, group_size=16, optimize=False)
TWO = HqqFormat(nbits=2, group_size=16, optimize=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "quantized"


def quantize(model, folder, **options):
    return tmo.quantize_checkpoint(model, folder, **{"experts": FOUR, "advance": lambda nbytes: None} | options)


def test_what_is_written_loads_as_the_model_that_was_quantized_while_it_was_loaded(plain, folder):
    made = quantize(plain, folder, dense=FOUR)
    assert made.folder == folder
    assert made.url is None
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(plain, moe_offload={"experts": FOUR, "dense": FOUR})
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=torch.arange(9)[None]).logits for model in (loaded, expected)))


def test_the_sizes_are_those_of_the_files_before_and_after(plain, folder):
    sizes = quantize(plain, folder).sizes
    assert sizes.plain_bytes == sum(tensor.nbytes for tensor in read_index(plain.glob("*.safetensors")).values())
    assert sizes.nbytes < sizes.plain_bytes
    assert sizes.smallest_budget == AutoModelForCausalLM.from_pretrained(folder).moe_offload.plan.smallest_budget


def test_a_callback_is_told_of_every_byte_of_the_weight_files(plain, folder):
    written = []
    quantize(plain, folder, advance=written.append)
    assert sum(written) == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_layers_and_the_experts_that_a_trace_saw_most_have_their_own_formats(plain, folder):
    names = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(4))
    trace = Trace(names, (8,) * 4, visits=[RecordedVisit(2, (1, 5), 0)], step_tokens=[1])
    formats = ExpertFormats(default=TWO, layers={"0": None}, hot=FOUR, hot_experts=trace.hottest("6.25%"))
    quantize(plain, folder, experts=formats)
    stored = AutoModelForCausalLM.from_pretrained(folder).moe_offload.config.experts
    assert dict(stored.hot_experts) == {"2": (1, 5)}
    assert stored.of_layer(0) is None
    assert stored.of_layer(1).nbits == 2


def test_dictionaries_stand_for_formats(plain, folder, tmp_path):
    quantize(plain, folder)
    as_dictionary = {"nbits": 4, "group_size": 16, "optimize": False}
    quantize(str(plain), str(tmp_path / "again" / "quantized"), experts=as_dictionary)
    assert files(folder) == files(tmp_path / "again" / "quantized")


def test_without_a_callback_there_is_a_progress_bar(plain, folder, capfd):
    quantize(plain, folder, advance=None)
    assert "Writing shards" in capfd.readouterr().err


def test_torch_has_its_threads_again(plain, folder):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        quantize(plain, folder)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# Interrupted, and what is there already.


@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_an_interrupted_call_is_resumed_and_gives_the_bytes_of_one_that_was_not(plain, folder, tmp_path, after):
    calls = []

    def interrupt(nbytes):
        calls.append(nbytes)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plain, folder, advance=interrupt)
    assert not (folder / INDEX_NAME).exists()
    quantize(plain, folder)
    quantize(plain, tmp_path / "undisturbed" / "quantized")
    assert files(folder) == files(tmp_path / "undisturbed" / "quantized")


def test_a_complete_checkpoint_is_replaced_only_on_request(plain, folder):
    quantize(plain, folder)
    before = files(folder)
    with pytest.raises(CheckpointError, match=r"holds a complete checkpoint; .* pass overwrite=True to replace it"):
        quantize(plain, folder, experts=TWO)
    assert files(folder) == before
    quantize(plain, folder, experts=TWO, overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(folder).moe_offload.config.experts.default.nbits == 2


def test_an_unfinished_checkpoint_of_another_recipe_is_left_alone(plain, folder):
    def interrupt(nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plain, folder, advance=interrupt)
    before = files(folder)
    with pytest.raises(CheckpointError, match="unfinished checkpoint by another recipe"):
        quantize(plain, folder, experts=TWO)
    assert files(folder) == before


# Wrong input: nothing is written.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": None}, ConfigError, "nothing to quantize; say how: experts=HqqFormat(nbits=4, group_size=64)"),
        ({"experts": ExpertFormats(layers={"0": None})}, ConfigError, "nothing to quantize"),
        ({"experts": "4x16"}, ConfigError, "experts='4x16' is not an HqqFormat, a dictionary of its fields, or None"),
        ({"dense": 4}, ConfigError, "dense=4 is not an HqqFormat"),
        ({"experts": HqqFormat(group_size=128)}, ConfigError, "group_size=128 does not divide"),
        (
            {"dense": HqqFormat(group_size=128)},
            ConfigError,
            "fits none of the model's attention and dense MLP matrices",
        ),
        ({"experts": ExpertFormats(layers={"9": FOUR})}, ConfigError, "names sparse layer '9', but the model has 4"),
        (
            {"experts": ExpertFormats(hot=FOUR, hot_experts={"0": [99]})},
            ConfigError,
            "the trace may be of another model",
        ),
        ({"push": "a/b/c"}, tmo.MoeOffloadError, "cannot upload to 'a/b/c'"),
    ],
)
def test_arguments_that_cannot_be_are_named_as_they_were_given(plain, folder, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        quantize(plain, folder, **options)
    assert not folder.exists()


@pytest.mark.parametrize("place", ["inside", ".", ".."])
def test_output_and_model_inside_one_another_are_refused(plain, place):
    before = files(plain)
    with pytest.raises(CheckpointError, match=r"output='.*' and model='.*' lie inside one another"):
        quantize(plain, plain / place, overwrite=True)
    assert files(plain) == before


def test_a_folder_of_other_files_is_refused(plain, folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        quantize(plain, folder)
    assert files(folder) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo", "there is no such folder, and it is not a valid Hub id, such as 'org/model'"),
        ("text.txt", "it is a file; name the folder that a model was saved to"),
        ("empty", "the folder has no config.json; name one that a model was saved to"),
        ("weightless", "cannot read the weights of "),
    ],
)
def test_a_model_that_is_not_there_is_one_error_of_ours(plain, folder, tmp_path, name, message):
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_bytes((plain / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(message)):
        quantize(tmp_path / name, folder)
    assert not folder.exists()


def test_a_model_without_experts_is_refused(folder, tmp_path):
    save_dense(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="has no routed experts"):
        quantize(tmp_path / "dense", folder)


def test_a_model_that_is_quantized_already_is_refused(plain, folder, tmp_path):
    quantize(plain, folder)
    with pytest.raises(ConfigError, match="is quantized already; quantize the model that it was made from"):
        quantize(folder, tmp_path / "again")


def test_it_is_uploaded_when_it_is_complete(plain, folder, monkeypatch):
    uploaded = []
    monkeypatch.setattr(HfApi, "repo_exists", lambda self, repo: True)
    monkeypatch.setattr(HfApi, "whoami", lambda self: {})

    def upload(api, place, repo, layout, **options):
        uploaded.append((repo, (place / INDEX_NAME).is_file(), options["private"]))
        return f"https://hub/{repo}"

    monkeypatch.setattr("transformers_moe_offload.hf.prebuilt.publish.upload", upload)
    made = quantize(plain, folder, push="me/quantized", private=True)
    assert uploaded == [("me/quantized", True, True)]
    assert made.url == "https://hub/me/quantized"
    assert 'from_pretrained("me/quantized"' in (folder / "README.md").read_text()


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "2"])
def test_workers_that_are_no_number_are_refused_before_the_folder_is_touched(plain, folder, workers):
    with pytest.raises(ConfigError, match=rf"workers={re.escape(repr(workers))} is not a positive number of experts"):
        quantize(plain, folder, workers=workers)
    assert not folder.exists()
