import ast
import builtins
from pathlib import Path

import pytest

from transformers_moe_offload import errors
from transformers_moe_offload.errors import CapacityError, CheckpointError, ConfigError, MoeOffloadError


def test_one_except_clause_catches_every_error_of_ours():
    ours = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Exception)]
    assert len(ours) == 8
    assert all(issubclass(error, MoeOffloadError) for error in ours)


def test_a_wrong_option_is_also_the_value_error_that_callers_of_transformers_catch():
    with pytest.raises(ValueError, match="cache_budget=0"):
        raise ConfigError("cache_budget=0")


def test_a_damaged_checkpoint_is_not_mistaken_for_a_wrong_option():
    assert not issubclass(CheckpointError, ValueError)


def test_a_capacity_error_carries_the_budget_that_would_work():
    error = CapacityError("too small", smallest_budget=128)
    assert error.smallest_budget == 128
    assert str(error) == "too small"


SOURCES = Path(errors.__file__).parent

BUILTIN = {name for name, thing in vars(builtins).items() if isinstance(thing, type) and issubclass(thing, Exception)}

STAYS_INSIDE = {
    # What cannot be, or what a class that extends another one has to define.
    "AssertionError",
    "NotImplementedError",
    # What the system has answered: the caller knows another way, or puts it into words.
    "OSError",
    "MemoryError",
}

CAUGHT = {("hf/routers/capture.py", "RuntimeError")}
"""By the caller in the same file."""

PROTOCOLS = {
    ("__init__.py", "AttributeError"),
    ("hf/prebuilt/moe_offload_required.py", "ImportError"),
    ("hf/upstream.py", "AttributeError"),
}
"""To importers: by a checkpoint's own code where the package is missing, and for a name that a module lacks."""


def raised_in(file: Path) -> set[tuple[str, str]]:
    """The file, and each builtin exception that it raises."""
    calls = [node.exc for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise)]
    names = {getattr(call.func if isinstance(call, ast.Call) else call, "id", None) for call in calls if call}
    return {(file.relative_to(SOURCES).as_posix(), name) for name in names & BUILTIN}


def test_what_is_raised_on_purpose_is_an_error_of_ours():
    raised = set().union(*(raised_in(file) for file in SOURCES.rglob("*.py")))
    assert {(file, name) for file, name in raised if name not in STAYS_INSIDE} == CAUGHT | PROTOCOLS
