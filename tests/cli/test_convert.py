"""`moe-offload convert` says what becomes of the weights, writes what loads, and refuses what cannot be."""

import pytest
from transformers import AutoModelForCausalLM

from hf.interop import mixtral_layout
from transformers_moe_offload.hf.prebuilt.publish import check_prebuilt
from zoo.build import build

from .conftest import the_error

FROM = ("--from", "mixtral-offloading")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    mixtral_layout.write(build("mixtral"), folder, coded_meta=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The original\n")
    return folder


def test_it_says_what_it_does_and_what_it_wrote_loads(run, source, tmp_path):
    folder = tmp_path / "converted"
    result = run("convert", source, folder, *FROM, "--base-model", "mistralai/Mixtral-8x7B-Instruct-v0.1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "experts: 2-bit, groups of 16 along the outputs, 16-bit scales; codes as they are",
        "scales and zeros: were in 8 bits, decoded to float16",
        "dense weights: decoded to float16",
        f"wrote {folder}",
    ]
    check_prebuilt(folder)
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model: mistralai/Mixtral-8x7B-Instruct-v0.1" in card
    model = AutoModelForCausalLM.from_pretrained(folder, moe_offload={"cache_budget": "30%"})
    assert model.generate(model.dummy_inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] >= 3
    assert model.moe_offload.stats().asked > 0


def test_the_same_checkpoint_gives_the_same_bytes(run, source, tmp_path):
    for name, workers in (("one", "1"), ("other", "3")):
        assert run("convert", source, tmp_path / name, *FROM, "--workers", workers).exit_code == 0
    for file in (tmp_path / "one").glob("moe_offload*"):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_a_complete_checkpoint_is_only_replaced_on_request(run, source, tmp_path):
    folder = tmp_path / "converted"
    assert run("convert", source, folder, *FROM).exit_code == 0
    assert "holds a complete checkpoint" in the_error(run("convert", source, folder, *FROM))
    assert run("convert", source, folder, *FROM, "--overwrite").exit_code == 0


def test_a_plain_checkpoint_is_not_in_the_layout(run, tmp_path):
    build("mixtral").save_pretrained(tmp_path / "plain", max_shard_size="300KB")
    error = the_error(run("convert", tmp_path / "plain", tmp_path / "converted", *FROM))
    assert "not in the layout of mixtral-offloading" in error
    assert not (tmp_path / "converted").exists()


def test_source_and_destination_must_lie_apart(run, source):
    assert "lie inside one another" in the_error(run("convert", source, source / "converted", *FROM))


def test_a_layout_must_be_named_and_known(run, source, tmp_path):
    assert run("convert", source, tmp_path / "converted").exit_code == 2
    result = run("convert", source, tmp_path / "converted", "--from", "ggml")
    assert result.exit_code == 2
    assert "mixtral-offloading" in result.stderr
