"""The benchmark runs from end to end, and its promises are judged from what it wrote."""

import json
import sys
from pathlib import Path

import pytest
import typer
from safetensors import safe_open
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for what only Linux tells")


@pytest.fixture(scope="module")
def decode(script):
    """The command in this process; rows are measured in others."""
    app = typer.Typer()
    app.command()(script("decode.decode").decode)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def outcome(decode, tmp_path_factory):
    """A quick run: its output and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = decode("--quick", "--threads", 1, "--made", folder / "made", "--results", folder)
    assert done.exit_code == 0, done.output
    return done.stdout, folder


@pytest.fixture
def result(outcome):
    (path,) = outcome[1].glob("decode-*.json")
    return json.loads(path.read_text())


def test_every_kind_of_row_is_measured(result):
    assert list(result["rows"]) == [
        "plain eager",
        "accelerate eager",
        "accelerate-cpu grouped_mm",
        "ours 25% fast",
        "ours 100% fast",
        "ours 25% fast copied",
        "ours 100% exact",
    ]
    for row in result["rows"].values():
        for state in ("warm", "cold"):
            assert [run["tokens"] for run in row[state]] == [4]
            assert row[state][0]["elapsed_s"] > 0


def test_bytes_and_hits_are_true(result):
    rows, layers_by_k = result["rows"], 2 * 2
    for state in ("warm", "cold"):
        for name in ("ours 25% fast", "ours 25% fast copied"):
            cached = rows[name][state][0]
            assert cached["hits"] + cached["late_hits"] + cached["misses"] == 4 * layers_by_k
            assert cached["disk_bytes"] == cached["misses"] * result["expert_bytes"]
            assert cached["misses"] > 0
        copied = rows["ours 25% fast copied"][state][0]
        assert copied["disk_bytes"] <= copied["rchar"]
        assert rows["ours 100% fast"][state][0]["misses"] == 0
        assert rows["accelerate eager"][state][0]["fetched_bytes"] == 4 * result["all_expert_bytes"]
    assert rows["accelerate eager"]["copied_bytes"] >= result["all_expert_bytes"]
    assert rows["accelerate-cpu grouped_mm"]["copied_bytes"] == 0


def test_cold_is_cold(result):
    if result["conditions"]["file_system"] == "tmpfs":
        pytest.skip("files in RAM cannot be dropped from it")
    for name in ("accelerate eager", "ours 25% fast"):
        assert result["rows"][name]["cached_share_after_drop"] == 0


def test_exact_has_the_logits_of_plain_transformers(result):
    assert result["rows"]["ours 100% exact"]["digest"] == result["rows"]["plain eager"]["digest"]


def test_the_report_names_its_conditions(outcome):
    (page,) = (path.read_text() for path in outcome[1].glob("decode-*.md"))
    for word in ("machine", "torch", "transformers", "accelerate", "bfloat16", "commit", "torch threads", "cache"):
        assert word in page
    assert "| ours 25% fast |" in page


def test_the_made_model_is_laid_out_like_a_saved_one(outcome, tmp_path):
    (made,) = (outcome[1] / "made").iterdir()
    Qwen3MoeForCausalLM(Qwen3MoeConfig.from_pretrained(made)).save_pretrained(tmp_path)
    assert shapes(made) == shapes(tmp_path)


def shapes(folder: Path) -> dict[str, list[int]]:
    """Every stored tensor's name and shape."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


def kept(decode, result: dict, tmp_path: Path) -> tuple[int, dict[str, bool]]:
    """What `--check` says of a result: its exit code, and each promise with whether it is kept."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    done = decode("--check", path)
    lines = [line.split("  ", 1) for line in done.stdout.splitlines()]
    return done.exit_code, {promise: sign == "kept" for sign, promise in lines}


def test_check_finds_the_promise_that_is_broken(decode, result, tmp_path):
    for name, seconds in {"plain eager": 1.0, "accelerate eager": 3.0, "ours 25% fast": 2.0}.items():
        result["rows"][name]["warm"][0]["elapsed_s"] = seconds
    result["rows"]["ours 100% fast"]["warm"][0]["elapsed_s"] = 1.04
    code, promises = kept(decode, result, tmp_path)
    assert code == 0
    assert all(promises.values())

    result["rows"]["ours 100% fast"]["warm"][0]["elapsed_s"] = 1.06
    result["rows"]["ours 25% fast"]["warm"][0]["elapsed_s"] = 3.1
    result["rows"]["ours 25% fast"]["warm"][0]["disk_bytes"] = result["all_expert_bytes"] * 4
    result["rows"]["ours 100% exact"]["digest"] = "another"
    result["rows"]["ours 25% fast"]["load_peak_rss"] += 10**9
    code, promises = kept(decode, result, tmp_path)
    broken = [promise for promise, is_kept in promises.items() if not is_kept]
    assert code == len(broken) == 6
    beginnings = ["100% budget", "25% budget, page", "25% budget: at", "25% budget: at", "arithmetic", "ours 25% fast"]
    assert [promise.startswith(start) for promise, start in zip(broken, beginnings, strict=True)] == [True] * 6


def test_a_row_that_is_missing_is_not_taken_for_a_promise_kept(decode, result, tmp_path):
    del result["rows"]["ours 25% fast"]
    code, promises = kept(decode, result, tmp_path)
    assert code > 0
    assert not all(promises.values())


def test_an_unknown_row_is_refused(decode, tmp_path):
    done = decode("--quick", "--row", "theirs 25%", "--made", tmp_path, "--results", tmp_path)
    assert done.exit_code == 2
    assert "'theirs 25%' is not one of plain eager" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
