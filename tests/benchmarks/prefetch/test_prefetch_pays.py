"""With and without prefetch are compared round by round, and the worst row decides."""

import pytest


@pytest.fixture
def pays(script):
    return script("prefetch.prefetch_pays")


def result(*on_s):
    off = [{"forward_s": [0.5, 0.5, 0.5]} for _ in on_s]
    runs = {"off": off, "on": [{"forward_s": [s / 2] * 3} for s in on_s], "control": off}
    return {"rows": {"tiny, 25%, cold": {"works": {"decode": runs}}}}


def test_a_gain_is_that_of_most_forwards_in_most_rounds(pays):
    (gain,) = pays.gains(result(0.5, 0.8, 4.0)).values()
    assert gain.typical == 1.25
    held_up = result(0.8, 0.8, 0.8)
    for number, run in enumerate(held_up["rows"]["tiny, 25%, cold"]["works"]["decode"]["on"]):
        run["forward_s"][number] = 5.0
    (gain,) = pays.gains(held_up).values()
    assert gain.typical == 1.25


def test_what_slows_a_whole_round_down_slows_both(pays):
    slow_round = result(0.8, 0.8, 0.8)
    for runs in slow_round["rows"]["tiny, 25%, cold"]["works"]["decode"].values():
        runs[1] = {"forward_s": [10 * s for s in runs[1]["forward_s"]]}
    (gain,) = pays.gains(slow_round).values()
    assert gain.typical == pytest.approx(1.25)


@pytest.mark.parametrize(("rounds", "beyond"), [(5, None), (6, 0), (9, 1), (15, 3)])
def test_the_interval_is_that_of_the_sign_test(pays, rounds, beyond):
    assert pays._ratios_beyond(rounds) == beyond


def test_a_row_is_slower_if_all_of_its_interval_is_and_not_if_its_median_is_not(pays):
    assert pays.verdict(result(*[1.03] * 9))[1] is True
    promise, is_kept = pays.verdict(result(*[1.05] * 9))
    assert is_kept is False
    assert "the worst is tiny, 25%, cold, decode: -4.8% (-4.8% to -4.8%)" in promise
    assert pays.verdict(result(*[1.0] * 4, *[1.05] * 5))[1] is None, "more rounds are needed"
    assert pays.verdict(result(1.05))[1] is None


def test_with_no_rows_nothing_is_claimed(pays):
    assert pays.verdict({"rows": {}})[1] is None


def test_both_rows_do_the_same_work(script, tiny_moe, one_thread):
    work = {"name": "decode", "prompt_tokens": 8, "steps": 2}
    job = {"budget": "25%", "state": "warm", "is_copied": True, "works": [work], "rounds": 2, "settling_steps": 0}
    runs = script("prefetch.in_turns").measure_in_turns(folder=tiny_moe, **job)["works"]["decode"]
    assert {row: len(found) for row, found in runs.items()} == {"off": 2, "on": 2, "control": 2}
    assert all(one["prefetch_used"] == 0 for row in ("off", "control") for one in runs[row])
    assert {one["asked"] for row in runs.values() for one in row} == {2 * 8 * 4}
