"""With and without prefetch are compared round by round, and the worst row decides."""

import pytest


@pytest.fixture
def pays(script):
    return script("prefetch_pays")


def result(*on_s):
    runs = {"off": [{"forward_s": [0.5, 0.5]} for _ in on_s], "on": [{"forward_s": [s / 2, s / 2]} for s in on_s]}
    return {"rows": {"tiny, 25%, cold": {"works": {"decode": runs}}}}


def test_a_gain_is_that_of_every_forward_in_most_of_its_rounds(pays):
    assert pays.gains(result(0.5, 0.8, 4.0)) == {"tiny, 25%, cold, decode": 1.25}
    held_up = result(0.8, 0.8, 0.8)
    held_up["rows"]["tiny, 25%, cold"]["works"]["decode"]["on"][0]["forward_s"][1] = 5.0
    held_up["rows"]["tiny, 25%, cold"]["works"]["decode"]["on"][1]["forward_s"][0] = 5.0
    assert pays.gains(held_up) == {"tiny, 25%, cold, decode": 1.25}


def test_three_percent_slower_is_borne_and_more_is_not(pays):
    assert pays.verdict(result(1.03))[1] is True
    promise, is_kept = pays.verdict(result(1.05))
    assert is_kept is False
    assert "the worst is tiny, 25%, cold, decode: -4.8%" in promise


def test_with_no_rows_nothing_is_claimed(pays):
    assert pays.verdict({"rows": {}})[1] is None


def test_both_rows_do_the_same_work(script, tiny_moe, one_thread):
    work = {"name": "decode", "prompt_tokens": 8, "steps": 2}
    job = {"budget": "25%", "state": "warm", "is_copied": True, "works": [work], "rounds": 2, "settling_steps": 0}
    runs = script("in_turns").measure_in_turns(folder=tiny_moe, **job)["works"]["decode"]
    assert [len(runs[row]) for row in ("off", "on")] == [2, 2]
    assert all(one["prefetch_used"] == 0 for one in runs["off"])
    assert {one["asked"] for row in runs.values() for one in row} == {2 * 8 * 4}
