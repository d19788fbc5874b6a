"""A misspelt name is answered with the known one that is nearest."""

from transformers_moe_offload.nearest import did_you_mean

KNOWN = ["lru", "lfu", "oracle"]


def test_the_nearest_name_is_found():
    assert did_you_mean("oracel", KNOWN, otherwise="; choose one") == "; did you mean 'oracle'?"


def test_a_name_like_no_other_has_no_nearest_one():
    assert did_you_mean("zzz", KNOWN) == ""
    assert did_you_mean("zzz", KNOWN, otherwise="; choose one") == "; choose one"


def test_what_is_no_text_has_no_nearest_name():
    assert did_you_mean(3, KNOWN) == ""


def test_of_a_long_name_only_the_beginning_is_compared():
    assert did_you_mean("lru" + 10**6 * "x", KNOWN) == ""
