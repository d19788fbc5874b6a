"""Sentences are about objects in the code: experts, tensors, threads and callers are no persons."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PERSONS = re.compile(r"\b(nobody|somebody|anybody|whoever|whomever)\b", re.IGNORECASE)
PROSE = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("folder", ["src", "docs"])
def test_there_is_prose_to_look_at(folder):
    assert any(path.is_relative_to(ROOT / folder) for path in PROSE)


def test_no_sentence_makes_a_person_of_an_object():
    """In docstrings, comments, messages and pages."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PROSE
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if PERSONS.search(line)
    ]
    assert found == []
