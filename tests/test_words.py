"""Sentences are about objects in the code: experts, tensors, threads and callers are no persons."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PERSONS = re.compile(r"\b(nobody|somebody|anybody|everybody|whoever|whomever|who|whom)\b", re.IGNORECASE)
OF_PEOPLE = re.compile(r"\b(people|person|reader|user)s?\b", re.IGNORECASE)
"""Lines that are about people may say so."""
NAMES = re.compile(r"(some|no)body/|of-somebody|--somebody-|\"(some|no)body\"|class Nobody")
"""Accounts, folders and predictors that tests make up."""
PROSE = [
    *sorted((ROOT / "src").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
]


@pytest.mark.parametrize("folder", ["src", "tests", "docs"])
def test_there_is_prose_to_look_at(folder):
    assert any(path.is_relative_to(ROOT / folder) for path in PROSE)


def test_no_sentence_makes_a_person_of_an_object():
    """In docstrings, comments, messages and pages."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PROSE
        if path != Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if PERSONS.search(NAMES.sub("", line)) and not OF_PEOPLE.search(line)
    ]
    assert found == []
