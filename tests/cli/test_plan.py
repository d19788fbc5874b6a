"""`moe-offload plan` shows true figures, downloads no weights, and says in one line what is wrong with its input."""

import json
import re

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from hub.server import Hub, Repo
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.loading.meta_model import meta_model
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.hub.weights import stored_tensors
from transformers_moe_offload.tensor_files.index import read_index
from zoo.build import build

from .conftest import TINY_MOE, the_error

ONE_EXPERT = 3 * 192 * 96 * 2
"""Bytes of an expert of the tiny MoE: three matrices in bfloat16."""
ONLINE = {"revision": "main", "token": None, "local_files_only": False}
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


def facts(result) -> dict[str, str]:
    """The lines of the second table: name -> value."""
    assert result.exit_code == 0, result.output
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.stdout.splitlines()[-10:])


def test_the_plan_of_the_tiny_moe_is_what_its_config_says(run, tiny_moe):
    result = run("plan", tiny_moe, "--cache-budget", "25%")
    shown = facts(result)
    assert shown["sparse layers"] == "8"
    assert shown["experts"] == "128, 16 per layer"
    assert shown["experts per token"] == "4 per layer"
    assert shown["bytes per expert"] == "108.0 KiB"
    assert shown["all experts"] == "13.5 MiB"
    assert shown["slots"] == "32 in a cache budget of 3.4 MiB"
    assert shown["smallest budget"] == f"108.0 KiB ({ONE_EXPERT:,} bytes)"
    expected = 8 * 4 * ONE_EXPERT * 0.75 / 2**20
    assert shown["expected bytes per token"].startswith(f"{expected:.1f} MiB from disk")
    assert "agrees with its config" in shown["checkpoint"]
    assert re.search(r"cache \(\w+.*\)\s+32 of 128 experts \(25%\)\s+3\.4 MiB", result.stdout)
    assert re.search(r"disk\s+all 128 experts, as stored\s+13\.5 MiB", result.stdout)


def test_the_plan_agrees_with_the_model_that_is_loaded(run, tiny_moe):
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, moe_offload=OffloadConfig(cache_budget="25%"))
    plan = model.moe_offload.plan
    shown = facts(run("plan", tiny_moe, "--cache-budget", "25%"))
    assert shown["slots"].startswith(f"{plan.num_slots} ")
    assert f"({plan.smallest_budget:,} bytes)" in shown["smallest budget"]
    dense_bytes = sum(tensor.nbytes for tensor in {id(t): t for t in model.parameters()}.values())
    assert shown["dense weights"] == f"{dense_bytes / 2**20:.1f} MiB"


def test_the_model_that_is_planned_has_no_weights(tiny_moe):
    planned = meta_model(str(tiny_moe), local_files_only=True)
    assert {parameter.device.type for parameter in planned.model.parameters()} == {"meta"}


def test_config_and_index_are_enough(run, linked):
    folder = linked(without="*.safetensors")
    assert facts(run("plan", folder))["checkpoint"] == "16.6 MiB by its index, which agrees with its config"


def test_without_an_index_the_config_is_enough(run, linked):
    folder = linked(without="*.safetensors*")
    assert "no index to check that with" in facts(run("plan", folder))["checkpoint"]


def test_from_the_hub_only_the_config_and_the_index_are_asked_for(run, monkeypatch, tmp_path):
    repo = tmp_path / "models--somebody--tiny-moe"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    asked_for = set()

    def download(repo_id, file, *, local_files_only, **options):
        if local_files_only or not (TINY_MOE / file).exists():
            raise LocalEntryNotFoundError(file)
        asked_for.add(file)
        (snapshot / file).symlink_to(TINY_MOE / file)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    assert facts(run("plan", "somebody/tiny-moe", "--cache-budget", "50%"))["slots"].startswith("64 ")
    assert asked_for == {"config.json", "model.safetensors.index.json"}


def test_another_dtype_changes_what_is_in_memory_and_not_what_is_read(run, tiny_moe):
    as_stored = facts(run("plan", tiny_moe, "--cache-budget", "25%"))
    in_float32 = facts(run("plan", tiny_moe, "--cache-budget", "25%", "--dtype", "float32"))
    assert in_float32["all experts"] == "27.0 MiB"
    assert in_float32["expected bytes per token"] == as_stored["expected bytes per token"]


def test_a_checkpoint_of_another_size_than_its_config_is_noticed(run, linked):
    folder = linked(without="*.safetensors", config={"num_hidden_layers": 4})
    assert "16.6 MiB by its index, but" in facts(run("plan", folder))["checkpoint"]


def test_the_plan_of_a_checkpoint_in_fp8_is_that_of_the_model_that_is_loaded(run, fp8):
    model = AutoModelForCausalLM.from_pretrained(fp8, moe_offload=OffloadConfig(cache_budget="25%"))
    plan, shown = model.moe_offload.plan, facts(run("plan", fp8, "--cache-budget", "25%"))
    assert shown["slots"].startswith(f"{plan.num_slots} ")
    assert f"({plan.smallest_budget:,} bytes)" in shown["smallest budget"]
    dense_bytes = sum(tensor.nbytes for tensor in {id(t): t for t in model.parameters()}.values())
    assert shown["dense weights"] == f"{dense_bytes / 2**10:.1f} KiB"
    assert shown["bits per expert weight"] == f"{8 + 32 / 16**2:.2f}"
    assert shown["checkpoint"] == "quantized with fp8; dense layers are opened while they are loaded"


def test_of_a_checkpoint_in_fp8_on_the_hub_only_headers_are_read(fp8, monkeypatch):
    with Hub() as hub:
        hub.repos["somebody/fp8"] = Repo(is_private=False)
        hub.repos["somebody/fp8"].add_commit("main", {file.name: file.read_bytes() for file in fp8.iterdir()})
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + TEMPLATE)
        found = stored_tensors("somebody/fp8", None, ONLINE)
    here = read_index([fp8 / "model.safetensors"])
    assert {(name, one.dtype, one.shape) for name, one in found.items()} == {
        (name, one.dtype, one.shape) for name, one in here.items()
    }


@pytest.mark.parametrize(("name", "count"), [("mixtral", 2), ("gemma4", 2), ("dbrx", 2), ("zaya", 1)])
def test_experts_per_token_are_found_in_the_module_tree(name, count):
    model = build(name)
    assert {experts_per_token(model, path) for path, _, _ in find_experts(model)} == {count}


def test_experts_per_token_that_no_module_tells_are_unknown():
    model = build("switch_transformers")
    assert {experts_per_token(model, path) for path, _, _ in find_experts(model)} == {None}


# Wrong input.


def test_a_budget_that_is_too_small_names_the_smallest(run, tiny_moe):
    error = the_error(run("plan", tiny_moe, "--cache-budget", "100KB"))
    assert f"set --cache-budget to {ONE_EXPERT:,} bytes or more" in error


def test_a_budget_that_cannot_be_parsed_is_shown_how(run, tiny_moe):
    error = the_error(run("plan", tiny_moe, "--cache-budget", "six gigs"))
    assert "'six gigs' is not a budget" in error
    assert "'6GiB'" in error


def test_an_unknown_dtype_is_refused(run, tiny_moe):
    assert "'bf16' is not 'auto'" in the_error(run("plan", tiny_moe, "--dtype", "bf16"))


def test_a_model_without_experts_is_refused(run, dense_model):
    error = the_error(run("plan", dense_model))
    assert "LlamaForCausalLM has no routed experts" in error


def test_an_unknown_id_is_refused(run):
    error = the_error(run("plan", "nobody/nothing-of-that-name", "--local-files-only"))
    assert "there is no folder 'nobody/nothing-of-that-name' here, and no model of that name can be read" in error


def test_a_folder_that_is_not_there_is_refused(run, tmp_path):
    assert "neither a folder with a model" in the_error(run("plan", tmp_path / "typo", "--local-files-only"))


def test_a_config_of_no_known_model_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    assert "never_heard_of" in the_error(run("plan", tmp_path))


def test_a_checkpoint_of_another_quantization_method_is_refused_by_name(run, linked):
    folder = linked(config={"quantization_config": {"quant_method": "awq"}})
    assert "already quantized with 'awq'" in the_error(run("plan", folder))


def test_an_index_that_is_none_is_refused(run, linked):
    folder = linked(without="*.safetensors*")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is not a checkpoint index" in the_error(run("plan", folder))


def test_an_index_that_points_outside_the_folder_is_refused(run, linked):
    folder = linked(without="*.safetensors*")
    index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not a file inside its folder; refusing to read outside of" in the_error(run("plan", folder))


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "m", "--cache-bugdet", "1GiB"], ["plam", "m"]])
def test_a_command_line_that_makes_no_sense_is_refused(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
