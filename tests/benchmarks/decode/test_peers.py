"""Rows with everything in memory are measured in processes of their own, and held against llama.cpp's."""

import json
from dataclasses import replace

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner


@pytest.fixture
def peers(script):
    return script("decode.peers")


def result(ours, theirs, nbytes=20e6, bandwidth=1e9):
    runs = {
        "this package, bfloat16": [
            {"token_s": [ours], "prompt_s": 1.0, "nbytes": nbytes, "bandwidth": [bandwidth / 2, bandwidth]}
        ],
        "llama.cpp, bfloat16": [{"token_s": [theirs], "prompt_s": 1.0, "nbytes": None}],
    }
    return {"shapes": {"many": {"runs": runs}}, "lengths": {"prompt": 512}}


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
    page = path.with_suffix(".md").read_text()
    assert "output embedding: of the row 'this package, 4 bits': 8-bit, groups of 64" in page


def test_the_bytes_of_a_token_have_the_head_as_it_is_stored_and_no_input_embedding(peers, script, tmp_path):
    shapes = script("harness.shape")
    shape = replace(shapes.QUICK, intermediate=64, is_tied=False)
    folder = script("harness.make_model").made_model(shape, tmp_path)
    with_head, without = (
        peers._bytes_of_a_token(AutoModelForCausalLM.from_pretrained(folder, moe_offload={"lm_head": format}))
        for format in (peers.EIGHT_BITS, None)
    )
    weights = shape.vocab * shape.hidden
    packed = weights + 2 * weights // 64 + 2 * 4 * weights // 64 // 128  # codes, scales and zeros, and their ranges
    assert without - with_head == 2 * weights - packed
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.hidden + 2 * shape.head_dim
    layer = attention + 2 * shape.hidden + shape.experts * shape.hidden
    experts = shape.experts_per_token * shape.expert_bytes
    floats = 2 * (weights + shape.hidden + shape.layers * layer) + shape.layers * experts
    assert 0 <= without - floats < 200  # frequencies of the rotary embedding
