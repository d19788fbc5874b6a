import pytest

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.registry import Registry


@pytest.fixture
def fruits():
    registry = Registry("fruit")
    registry.register("pear")("a pear")
    registry.register("apple")("an apple")
    return registry


def test_what_is_registered_is_found_by_its_name(fruits):
    assert fruits["pear"] == "a pear"
    assert fruits.names() == ["apple", "pear"]


def test_registering_gives_back_what_it_was_given(fruits):
    @fruits.register("plum")
    class Plum:
        pass

    assert fruits["plum"] is Plum


def test_an_unknown_name_lists_those_there_are_and_suggests_the_nearest(fruits):
    with pytest.raises(ConfigError, match=r"fruit='aple' is not a known fruit; choose one of \['apple', 'pear'\]") as e:
        fruits["aple"]
    assert str(e.value).endswith("or register your own; did you mean 'apple'?")


def test_nothing_is_suggested_where_nothing_is_near(fruits):
    with pytest.raises(ConfigError, match=r"or register your own$"):
        fruits["sofa"]


def test_a_name_that_is_taken_is_refused_unless_it_may_be(fruits):
    with pytest.raises(ConfigError, match="a fruit named 'pear' is already registered; choose another name"):
        fruits.register("pear")("another pear")
    assert fruits["pear"] == "a pear"
    fruits.register("pear", exist_ok=True)("another pear")
    assert fruits["pear"] == "another pear"
