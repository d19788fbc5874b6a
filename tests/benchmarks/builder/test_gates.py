"""The study of gates runs, and its verdicts follow from its figures."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

LICENCE = Path(__file__).parents[3] / "LICENSE"


@pytest.fixture(scope="module")
def gates(script):
    return script("builder.gates")


@pytest.fixture(scope="module")
def result(gates, one_thread, tmp_path_factory):
    """What `--quick` writes, with a licence for text, which will not change."""
    folder = tmp_path_factory.mktemp("gates")
    licence = LICENCE.read_text()
    texts = {
        domain: {"train": shortest(licence[start:]), "held_out": shortest(licence[start + 2000 :])}
        for domain, start in (("prose", 0), ("python", 3000), ("c", 6000))
    }
    (folder / "texts.json").write_text(json.dumps(texts))
    gates.compare_gates(quick=True, text=folder / "texts.json", results=folder / "results")
    (path,) = (folder / "results").glob("gates-*.json")
    assert path.with_suffix(".md").read_text().count("| ridge |") == 2
    return json.loads(path.read_text())


def shortest(text):
    """Two texts that are just long enough."""
    return [text[:510], text[510:1020]]


def test_every_gate_and_every_dense_model_has_its_row(gates, result):
    assert list(result["dense"]) == [
        "base model", "specialist prose", "specialist python", "specialist c", "mean of specialists"
    ]  # fmt: skip
    for sweep in (*result["sweeps"].values(), *result["trained"].values()):
        assert [row["name"] for row in sweep["rows"]] == list(gates.GATES)
        assert all(set(row["bits_per_byte"]) == {"prose", "python", "c"} for row in sweep["rows"])


def test_training_moves_what_routers_choose(result):
    """One step, whose direction is the loss's: what is better after it is not for this test to say."""
    for untrained, trained in zip(result["sweeps"].values(), result["trained"].values(), strict=True):
        for before, after in zip(untrained["rows"], trained["rows"], strict=True):
            assert before["entropy"] != after["entropy"], before["name"]


def test_a_promise_that_is_not_kept_is_said_to_be_broken(gates, result):
    worse = deepcopy(result)
    (ours,) = [row for row in worse["sweeps"]["2"]["rows"] if row["name"] == gates.OURS]
    ours["bits_per_byte"] = {domain: 2 * bits for domain, bits in ours["bits_per_byte"].items()}
    ours["sent_home"] = dict.fromkeys(ours["sent_home"], 0.5)
    assert [is_kept for promise, is_kept in gates.verdicts(worse) if promise.startswith("2 of 3")] == [False] * 4
