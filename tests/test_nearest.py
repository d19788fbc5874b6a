"""A misspelt name is answered with the known one that is nearest."""

from transformers_moe_offload.nearest import did_you_mean, nearest

KNOWN = ["lru", "lfu", "oracle"]


def test_the_nearest_name_is_found():
    assert nearest("oracel", KNOWN) == "oracle"
    assert did_you_mean("oracel", KNOWN, otherwise="; choose one") == "; did you mean 'oracle'?"


def test_a_name_like_no_other_has_no_nearest_one():
    assert nearest("zzz", KNOWN) is None
    assert did_you_mean("zzz", KNOWN) == ""
    assert did_you_mean("zzz", KNOWN, otherwise="; choose one") == "; choose one"


def test_what_is_no_text_has_no_nearest_name():
    assert nearest(3, KNOWN) is None


def test_of_a_long_name_only_the_beginning_is_compared():
    assert nearest("lru" + 10**6 * "x", KNOWN) is None
