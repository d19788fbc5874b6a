"""Rows with everything in memory are measured in processes of their own, and held against llama.cpp's."""

import json

import pytest
import typer
from typer.testing import CliRunner


@pytest.fixture
def peers(script):
    return script("decode.peers")


def result(ours, theirs, nbytes=20e6, bandwidth=1e9):
    runs = {
        "this package, bfloat16": [{"token_s": [ours], "prompt_s": 1.0, "nbytes": nbytes}],
        "llama.cpp, bfloat16": [{"token_s": [theirs], "prompt_s": 1.0, "nbytes": None}],
    }
    return {"shapes": {"many": {"runs": runs, "bandwidth": [bandwidth]}}, "lengths": {"prompt": 512}}


def kept(verdicts):
    return [is_kept for promise, is_kept in verdicts if is_kept is not None]


def test_a_token_may_take_so_many_times_what_llama_cpp_takes(peers):
    assert kept(peers.verdicts(result(0.025, 0.02))) == [True]
    assert kept(peers.verdicts(result(0.026, 0.02))) == [False]


def test_a_share_above_the_memorys_speed_is_a_fault_of_the_measurement(peers):
    (_, fault) = [one for one in peers.verdicts(result(0.019, 0.02)) if one[1] is not None]
    assert fault == ("many, this package, bfloat16: 105% of RAM's speed, so that was measured too low", False)
    assert peers.table(result(0.025, 0.02), "many").rows[0][3] == "80%"


def test_all_rows_of_this_package_are_measured(peers, tmp_path):
    app = typer.Typer()
    app.command()(peers.compare)
    done = CliRunner().invoke(app, ["--quick", "--threads", "1", "--made", str(tmp_path), "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("peers-*.json")
    runs = json.loads(path.read_text())["shapes"]["quick"]["runs"]
    assert runs.keys() == {*peers.OURS, peers.PLAIN}
    dense, packed = (runs[row][0]["nbytes"] for row in peers.OURS)
    assert 0 < packed < dense
