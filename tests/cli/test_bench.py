"""`moe-offload bench` measures, writes its results down, and says in one line what is wrong with its input."""

import json

import pytest

from .conftest import the_error


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One quick measurement: what was printed, and the file."""
    from typer.testing import CliRunner

    from moe_offload_cli.main import app

    from .conftest import TINY_MOE

    path = tmp_path_factory.mktemp("bench") / "result.json"
    config = ["--cache-budget", "40%", "--policy", "slru", "--prefetch", "next_router", "--no-mmap"]
    arguments = ["bench", str(TINY_MOE), *config, "--quick", "--json", str(path)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(path.read_text())


def test_the_tables_show_bandwidth_dispatch_and_every_workload(measured):
    printed, _ = measured
    for word in ("disk, cold", "RAM, read (", "arithmetic", "decode", "prefill 128", "batch 8", "beam 5"):
        assert word in printed
    assert "Page cache warm" in printed
    assert "reached" in printed


def test_the_file_has_the_figures_and_what_they_hold_for(measured):
    _, result = measured
    config = result["model"]["config"]
    assert (config["cache_budget"], config["policy"], config["mmap"]) == ("40%", "slru", False)
    assert config["prefetch"]["predictor"] == "next_router"
    assert result["model"]["dtype"] == "bfloat16"
    assert result["conditions"]["packages"].keys() >= {"torch", "transformers"}
    assert result["conditions"]["commit"]
    assert {"decode", "prefill 128", "batch 8", "beam 5"} == set(result["workloads"])


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(run, tiny_moe, tmp_path):
    assert "is not a folder" in the_error(run("bench", tiny_moe, "--json", tmp_path / "nowhere" / "result.json"))
    assert "is a folder" in the_error(run("bench", tiny_moe, "--json", tmp_path))


def test_a_text_that_cannot_be_read_is_named(run, tiny_moe, tmp_path):
    assert "cannot read --text" in the_error(run("bench", tiny_moe, "--text", tmp_path / "missing.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xff")
    assert "cannot read --text" in the_error(run("bench", tiny_moe, "--text", tmp_path / "binary"))


def test_an_empty_text_is_named(run, tiny_moe, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "empty.txt has no text in it" in the_error(
        run("bench", tiny_moe, "--quick", "--text", tmp_path / "empty.txt")
    )


def test_unknown_policies_and_models_are_errors_of_one_line(run, tiny_moe, dense_model, tmp_path):
    assert "--policy 'nonsense' is not a known policy" in the_error(run("bench", tiny_moe, "--policy", "nonsense"))
    assert "--prefetch 'nonsense'" in the_error(run("bench", tiny_moe, "--prefetch", "nonsense"))
    assert "cannot load" in the_error(run("bench", tmp_path / "missing", "--local-files-only"))


def test_a_budget_too_small_names_the_smallest(run, tiny_moe):
    assert "set --cache-budget to 110,592 bytes or more" in the_error(run("bench", tiny_moe, "--cache-budget", "1kB"))


def test_kernels_are_measured_without_a_model(run, tmp_path):
    path = tmp_path / "kernels.json"
    result = run("bench", "--kernels", "--quick", "--json", path)
    assert result.exit_code == 0, result.output
    for word in ("768 x 2048", "4-bit, int8 input", "dense float32", "memory: ", "cpu: "):
        assert word in result.stdout
    assert json.loads(path.read_text())["measured"][0]["shape"] == [768, 2048]


def test_a_model_or_kernels_must_be_asked_for(run, tiny_moe):
    for arguments in ([], [tiny_moe, "--kernels"]):
        assert "give one of the two" in the_error(run("bench", *arguments))
