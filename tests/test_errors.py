import pytest

from transformers_moe_offload import errors
from transformers_moe_offload.errors import CapacityError, CheckpointError, ConfigError, MoeOffloadError


def test_one_except_clause_catches_every_error_of_ours():
    ours = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Exception)]
    assert len(ours) == 7
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
