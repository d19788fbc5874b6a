"""The example of routing research runs, and its figures say what they must."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from transformers_moe_offload.routing import RoutingTrace

EXAMPLES = Path(__file__).parent.parent / "examples"


def imported(file):
    spec = importlib.util.spec_from_file_location(f"{file.stem}_example", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example():
    return imported(EXAMPLES / "routing.py")


def test_it_records_compares_and_measures(example, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["routing.py", "--windows", "1", "--output", str(tmp_path / "trace")])
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "trace.json").write_text("{}")  # of a run before
    example.main()
    shown = capsys.readouterr().out
    trace = RoutingTrace.load(tmp_path / "trace")
    assert trace.domains == ("prose", "python")
    assert trace.num_tokens == 2 * example.LENGTH
    losses = {name: float(loss) for name, loss in re.findall(r"^  (\w+) : prose ([\d.]+)", shown, re.M)}
    assert losses["random"] > losses["top_k"] + 0.3
    assert len(re.findall(r"^  router \d: [+-]\d\.\d\d$", shown, re.M)) == 8


def test_the_texts_of_the_evaluation_task_are_there():
    for domain in ("prose", "python"):
        lines = (EXAMPLES / "evaluation" / f"{domain}.jsonl").read_text().splitlines()
        assert len(lines) > 10
        assert all(len(json.loads(line)["text"]) > 200 for line in lines)
        assert f"data.{domain}" in (EXAMPLES / "evaluation" / f"{domain}.yaml").read_text()


def test_every_text_of_the_continuation_task_has_its_own_next_bit_among_four():
    pytest.importorskip("datasets")
    data = imported(EXAMPLES / "evaluation" / "data.py")
    whole = [row["text"] for domain in ("prose", "python") for row in data.texts(domain)["test"]]
    rows = data.continuations()["test"]
    assert len(rows) == len(whole)
    for row, text in zip(rows, whole, strict=True):
        assert [text.startswith(row["first"] + choice) for choice in row["choices"]].count(True) == 1
        assert text.startswith(row["first"] + row["choices"][row["own"]])
    assert {row["own"] for row in rows} == {0, 1, 2, 3}
