"""Residencies are measured in turns, and what a batch moves is checked against what its routers wanted."""

from copy import deepcopy

import pytest


@pytest.fixture(scope="module")
def measured(script, tiny_moe, one_thread):
    job = {"percents": [40, 100], "compared": 40, "rounds": 1, "prompt_tokens": 4, "steps": 2, "is_copied": True}
    return script("disk.resident").measure_residencies(folder=tiny_moe, **job)


@pytest.fixture
def found(measured):
    return deepcopy(measured)


def test_every_residency_and_the_beams_are_measured(found):
    assert {percent: len(runs) for percent, runs in found["runs"].items()} == {"40": 1, "100": 1}
    assert found["runs"]["100"][0]["misses"] == 0
    assert found["runs"]["40"][0]["misses"] > 0
    assert found["searched"]["beam 5"][0]["asked"] > found["searched"]["decode"][0]["asked"]


def test_a_batch_moves_each_wanted_expert_once(found):
    one_slot = found["batch"]["one slot"]
    one = found["model"]["expert_bytes"] // found["model"]["experts"]
    assert one_slot["run"]["asked"] == one_slot["wanted"]
    assert one_slot["run"]["disk_bytes"] == (one_slot["wanted"] - one_slot["run"]["hits"]) * one


def test_promises_are_judged_by_their_figures(script, found):
    residency = script("disk.residency")
    found["runs"]["25"] = found["runs"]["40"]
    for runs in (*found["runs"].values(), *found["searched"].values()):
        runs[0] |= {"elapsed_s": 2.0}
    result = {"rows": {"tiny": found}}
    assert [is_kept for _, is_kept in residency.verdicts(result)] == [True, True, True]
    assert len(residency.tables(result)[0].rows) == 3

    found["runs"]["40"][0]["elapsed_s"] = 2.6
    found["searched"]["beam 5"][0]["elapsed_s"] = 4.1
    found["batch"]["one slot"]["wanted"] += 1
    assert [is_kept for _, is_kept in residency.verdicts(result)] == [False, False, False]
