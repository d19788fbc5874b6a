"""`moe-offload quantize` shows its plan, writes what loads, goes on where it was killed, and refuses what cannot be."""

import json
import multiprocessing
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forked import with_locks_of_its_own
from transformers_moe_offload import ExpertFormats, HqqFormat, OffloadConfig, routing
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.tracing import RecordedVisit, Trace
from zoo.build import build

from .conftest import the_error


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of four small layers, with a licence and a card."""
    folder = tmp_path_factory.mktemp("source")
    build("qwen3_moe").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The original\n")
    (folder / "LICENSE").write_text("Apache License")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "quantized"


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_tiny_moe_is_quantized_and_generates(run, tiny_moe, folder):
    result = run("quantize", tiny_moe, folder, "--experts", "4x32", "--dense", "8x64", "--no-optimize")
    assert result.exit_code == 0, result.output
    assert re.search(r"128 experts\s+4-bit, groups of 32\s+4\.5\d\s+13\.5 MiB\s+3\.\d MiB", result.stdout)
    assert re.search(r"dense\s+8-bit, groups of 64\s+8\.2\d\s+3\.1 MiB\s+2\.\d MiB", result.stdout)
    assert result.stdout.rstrip().endswith(f"wrote {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer("import os\n\ndef ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("import os\n\ndef ")
    assert model.moe_offload.stats().asked > 0


def test_weights_that_transformers_keeps_in_float32_are_written_and_loaded_so(run, tmp_path, folder):
    """Routers of some architectures, whatever dtype their checkpoints have: other bits there are other experts."""
    source = tmp_path / "source"
    build("deepseek_v3").to(torch.bfloat16).save_pretrained(source)
    plain = AutoModelForCausalLM.from_pretrained(source)
    dtypes = {name: tensor.dtype for name, tensor in plain.state_dict().items()}
    assert torch.float32 in dtypes.values()
    assert run("quantize", source, folder, "--experts", "4x16", "--dense", "8x16", "--no-optimize").exit_code == 0
    written = {name: tensor.dtype for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    formats = {"experts": HqqFormat(nbits=4, group_size=16, optimize=False)}
    formats["dense"] = HqqFormat(nbits=8, group_size=16, optimize=False)
    models = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(source, moe_offload=formats),
    )
    for model in models:
        kept = {name: tensor.dtype for name, tensor in model.named_parameters()}
        assert any(name.endswith("gate.weight") for name in kept), "a router in low bits"
        for found in (kept, written):
            assert {name: dtype for name, dtype in found.items() if name in dtypes} == {
                name: dtypes[name] for name in found if name in dtypes
            }
    token_ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=token_ids).logits for model in models))


def test_what_belongs_to_the_model_comes_along_and_other_weights_do_not(run, source, folder):
    assert run("quantize", source, folder, "--experts", "4x16", "--base-model", "somebody/original").exit_code == 0
    written = files(folder)
    assert written["LICENSE"] == b"Apache License"
    assert "generation_config.json" in written
    assert not [name for name in written if name.endswith(".bin.index.json") or name.startswith("model")]
    card = written["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "base_model: somebody/original" in card


def test_layers_have_the_formats_that_were_asked_for(run, source, folder):
    options = ("--experts", "2x16", "--layers", "0=8x32m16", "--layers", "1-2=none", "--no-optimize")
    assert run("quantize", source, folder, *options).exit_code == 0
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert recipe["experts"]["default"]["nbits"] == 2
    assert recipe["experts"]["default"]["optimize"] is False
    assert recipe["experts"]["layers"]["0"]["meta_nbits"] == 16
    assert recipe["experts"]["layers"]["1-2"] is None
    assert recipe["dense"] is None
    AutoModelForCausalLM.from_pretrained(folder)


def test_the_experts_that_a_trace_saw_most_have_a_format_of_their_own(run, tiny_moe, folder, tmp_path):
    trace = Trace(tuple(f"model.layers.{n}.mlp.experts" for n in range(8)), (16,) * 8)
    trace.visits = [RecordedVisit(layer, (3, 5), 0) for layer in range(8)] + [RecordedVisit(0, (3, 7), 0)] * 9
    trace.visits += [RecordedVisit(4, tuple(range(16)), step) for step in range(1, 20)]  # of many tokens each
    trace.step_tokens = [1, *[8] * 19]
    trace.save(tmp_path / "trace.npz")
    options = ("--experts", "2x32", "--hot", "4x32", "--trace", tmp_path / "trace.npz", "--hot-share", "2%")
    planned = run("plan", tiny_moe, *options)
    assert planned.exit_code == 0, planned.output
    assert re.search(r"bits per expert weight\s+2\.56", planned.stdout)
    assert re.search(r"bytes per expert\s+17\.\d KiB to 30\.\d KiB", planned.stdout)
    result = run("quantize", tiny_moe, folder, *options, "--no-optimize")
    assert result.exit_code == 0, result.output
    assert re.search(r"128 experts\s+2-bit, groups of 32; 3 hot: 4-bit, groups of 32\s+2\.56", result.stdout)
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]["experts"]
    assert recipe["hot_experts"] == {"0": [3, 5, 7]}
    assert "| 3 experts that are used most | 4-bit, groups of 32 |" in (folder / "README.md").read_text()
    (tmp_path / "trace.npz").unlink()
    assert "3 hot experts: 4-bit, groups of 32" in run("plan", folder).stdout
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "3 hot experts" in str(model.moe_offload.config.experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hot", "4x32"), "--hot 4x32 needs a --trace that tells which experts are used most"),
        (
            ("--trace", "TRACE"),
            "--trace and --hot-share choose hot experts, but there is no --hot that gives their format",
        ),
        (("--hot", "4x32", "--trace", "nowhere.npz"), "cannot read the trace nowhere.npz"),
        (("--hot", "4x32", "--trace", "TRACE", "--hot-share", "ten"), "'ten' is not a share of all experts"),
        (
            ("--hot", "4x32", "--trace", "TRACE", "--hot-share", "50%"),
            "recorded with 1 sparse layers of 4 experts, but",
        ),
    ],
)
def test_hot_experts_that_nobody_can_tell_are_refused(run, tiny_moe, folder, tmp_path, options, message):
    trace = Trace(("experts",), (4,), visits=[RecordedVisit(0, (1,), 0)], step_tokens=[1])
    trace.save(tmp_path / "trace.npz")
    options = [tmp_path / "trace.npz" if option == "TRACE" else option for option in options]
    assert message in the_error(run("quantize", tiny_moe, folder, "--experts", "2x32", *options))
    assert not folder.exists()


@pytest.mark.parametrize("command", ["plan", "chat", "quantize"])
def test_every_command_refuses_the_trace_of_another_model_even_if_all_its_experts_exist(
    run, tiny_moe, tmp_path, command
):
    names = tuple(f"model.layers.{n}.mlp.experts" for n in range(8))
    trace = Trace(names, (8,) * 8, visits=[RecordedVisit(0, (1,), 0)], step_tokens=[1])
    trace.save(tmp_path / "trace.npz")
    places = {"chat": ("--prompt", "int main("), "quantize": (tmp_path / "made",)}.get(command, ())
    result = run(command, tiny_moe, *places, "--hot", "4x32", "--trace", tmp_path / "trace.npz")
    assert "recorded with 8 sparse layers of 8 experts, but" in the_error(result)
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def recording(tiny_moe, tmp_path_factory):
    """The folder of a recording of one forward of many tokens, and its trace."""
    folder = tmp_path_factory.mktemp("recording")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe)
    token_ids = torch.randint(3, 4000, (2, 100), generator=torch.Generator().manual_seed(0))
    with routing.record_routing(model, folder / "routing") as recorder, torch.no_grad():
        model(input_ids=token_ids)
    return folder / "routing", recorder.trace


def test_the_folder_of_a_recording_tells_which_experts_are_hot(run, tiny_moe, folder, recording):
    path, trace = recording
    options = ("--experts", "2x32", "--hot", "4x32", "--trace", path, "--hot-share", "10%")
    planned = run("plan", tiny_moe, *options)
    assert planned.exit_code == 0, planned.output
    result = run("quantize", tiny_moe, folder, *options, "--no-optimize")
    assert result.exit_code == 0, result.output
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]["experts"]
    assert recipe["hot_experts"] == trace.hottest("10%")


def test_a_recording_of_another_model_is_refused(run, source, folder, recording):
    result = run("quantize", source, folder, "--experts", "2x16", "--hot", "4x16", "--trace", recording[0])
    assert "was recorded with 8 sparse layers of 16 experts, but" in the_error(result)
    assert not folder.exists()


@pytest.mark.parametrize("command", ["plan", "chat", "quantize"])
def test_a_folder_that_is_no_recording_and_a_trace_that_counts_no_tokens_are_one_line(run, tiny_moe, tmp_path, command):
    (tmp_path / "empty").mkdir()
    trace = Trace(("experts",), (4,), visits=[RecordedVisit(0, (1,), 0)], step_tokens=[9])
    trace.save(tmp_path / "prompt.npz")
    places = {"chat": ("--prompt", "int main("), "quantize": (tmp_path / "made",)}.get(command, ())
    for name, message in (("empty", "cannot read the"), ("prompt.npz", "its steps have 9 tokens")):
        result = run(command, tiny_moe, *places, "--hot", "4x32", "--trace", tmp_path / name)
        assert message in the_error(result)
    assert not (tmp_path / "made").exists()


def test_a_dry_run_writes_nothing_and_needs_no_weights(run, linked, folder):
    result = run("quantize", linked(without="*.safetensors"), folder, "--experts", "3x32", "--dry-run")
    assert result.exit_code == 0
    assert re.search(r"128 experts\s+3-bit, groups of 32\s+3\.5\d", result.stdout)
    assert not folder.exists()


def test_killed_and_run_again_it_gives_the_bytes_of_a_run_that_was_not(run, tiny_moe, folder, tmp_path):
    options = ("--experts", "2x32", "--workers", "1")
    child = multiprocessing.get_context("fork").Process(
        target=with_locks_of_its_own, args=(run, "quantize", tiny_moe, folder, *options)
    )
    child.start()
    while child.is_alive() and not list(folder.glob("moe_offload-00001-*")):
        time.sleep(0.005)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (folder / INDEX_NAME).exists()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert run("quantize", tiny_moe, folder, *options).exit_code == 0
    assert run("quantize", tiny_moe, tmp_path / "undisturbed" / "quantized", *options).exit_code == 0
    assert files(folder) == files(tmp_path / "undisturbed" / "quantized")


def test_a_checkpoint_in_fp8_is_opened_and_quantized_anew(run, fp8, folder):
    result = run("quantize", fp8, folder, "--experts", "4x16", "--layers", "0=none")
    assert result.exit_code == 0, result.output
    assert re.search(r"32 experts\s+4-bit, groups of 16; opened from fp8\s+\d", result.stdout)
    assert re.search(r"dense\s+opened from fp8", result.stdout)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moe_offload"
    assert "| experts of sparse layers 0 | opened from fp8 |" in (folder / "README.md").read_text()
    on_load = OffloadConfig(experts=ExpertFormats(default=HqqFormat(nbits=4, group_size=16), layers={"0": None}))
    expected = AutoModelForCausalLM.from_pretrained(fp8, moe_offload=on_load)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(9)[None]
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_complete_checkpoint_is_replaced_only_on_request(run, source, folder):
    assert run("quantize", source, folder, "--experts", "4x16").exit_code == 0
    before = files(folder)
    error = the_error(run("quantize", source, folder, "--experts", "2x16"))
    assert "holds a complete checkpoint; choose another folder, or pass --overwrite" in error
    assert files(folder) == before
    assert run("quantize", source, folder, "--experts", "2x16", "--overwrite").exit_code == 0
    assert b'"nbits": 2' in (folder / "config.json").read_bytes()


# Wrong input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to quantize; say how: --experts 4x64"),
        (("--experts", "four"), "'four' is not a format; write bits and group size such as 4x64"),
        (("--experts", "5x64"), "--experts '5x64' is not a format: the number of bits is one of 8, 4, 3, 2, 1"),
        (("--experts", "4x48"), "--experts '4x48' is not a format: a group size is one of 16, 32, 64, 128"),
        (("--experts", "4x128"), "mlp.experts: group_size=128 does not divide the 64 inputs of gate_up_proj"),
        (("--layers", "3"), "--layers '3' names no format; write sparse layers and a format as 0-3=4x64"),
        (("--layers", "0-77=4x16"), "--layers names sparse layer '0-77', but the model has 4, 0 to 3"),
        (("--experts", "4x16", "--layers", "0=2x16", "--layers", "0-1=4x16"), "layers names sparse layer 0 twice"),
    ],
)
def test_formats_that_cannot_be_are_refused_before_anything_is_written(run, source, folder, options, message):
    assert message in the_error(run("quantize", source, folder, *options))
    assert not folder.exists()


@pytest.mark.parametrize("target", ["inside", ".", ".."])
def test_source_and_target_inside_one_another_are_refused(run, source, target):
    before = files(source)
    error = the_error(run("quantize", source, source / target, "--experts", "4x16", "--overwrite"))
    assert "lie inside one another" in error
    assert files(source) == before


def test_a_model_that_is_quantized_already_is_refused(run, source, folder, tmp_path):
    assert run("quantize", source, folder, "--experts", "4x16").exit_code == 0
    error = the_error(run("quantize", folder, tmp_path / "again", "--experts", "2x16"))
    assert "is quantized already; quantize the model that it was made from" in error


def test_a_model_of_another_method_that_cannot_be_opened_is_refused_by_name(run, linked, folder):
    model = linked(config={"quantization_config": {"quant_method": "awq"}})
    assert "already quantized with 'awq'" in the_error(run("quantize", model, folder, "--experts", "4x32"))


def test_weights_of_another_method_that_are_not_there_are_refused(run, linked, folder):
    model = linked(without="*.safetensors*", config={"quantization_config": {"quant_method": "fp8"}})
    error = the_error(run("quantize", model, folder, "--experts", "4x32"))
    assert "is quantized with 'fp8', and the headers of its files say how: " in error
    assert not folder.exists()


def test_a_model_without_experts_is_refused(run, dense_model, folder):
    assert "has no routed experts" in the_error(run("quantize", dense_model, folder, "--experts", "4x64"))


def test_a_model_that_is_not_there_is_refused(run, folder, tmp_path):
    error = the_error(run("quantize", tmp_path / "typo", folder, "--experts", "4x64", "--local-files-only"))
    assert "neither a folder with a model nor one that can be read" in error


def test_weights_that_are_not_there_are_refused(run, linked, folder):
    error = the_error(run("quantize", linked(without="*.safetensors*"), folder, "--experts", "4x32"))
    assert "cannot read the weights of" in error
    assert not folder.exists()


def test_a_shard_that_is_cut_short_is_refused(run, linked, folder):
    model = linked()
    shard = model / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1])
    error = the_error(run("quantize", model, folder, "--experts", "4x32"))
    assert "model-00002-of-00003.safetensors" in error
    assert "truncated" in error


def test_pushing_what_is_no_checkpoint_of_ours_is_refused(run, tiny_moe):
    assert "is not a complete prebuilt checkpoint" in the_error(run("push", tiny_moe, "me/tiny"))


@pytest.mark.parametrize("repo", ["a/b/c", "me/has a space"])
def test_a_repository_that_cannot_be_is_refused_before_anything_is_written(run, source, folder, repo):
    error = the_error(run("quantize", source, folder, "--experts", "4x16", "--push", repo))
    assert f"cannot upload to {repo!r}" in error
    assert not folder.exists()


def test_a_format_of_none_for_everything_is_nothing_to_quantize(run, tiny_moe, folder):
    for options in (("--experts", "none"), ("--layers", "0-3=none"), ("--experts", "none", "--dense", "none")):
        assert "nothing to quantize" in the_error(run("quantize", tiny_moe, folder, *options))
    assert not folder.exists()


def test_what_is_not_there_cannot_be_pushed(run, tmp_path):
    assert f"there is no folder {tmp_path / 'typo'}" in the_error(run("push", tmp_path / "typo", "me/model"))
