"""Attention of the newest token is measured both ways, at every number of heads and tokens."""

import json

import pytest
import typer
from typer.testing import CliRunner

from transformers_moe_offload.kernels import native


@pytest.fixture
def attention(script):
    return script("decode.attention")


@pytest.mark.skipif(native.library() is None, reason="the kernels were not compiled")
def test_every_row_is_measured_both_ways(attention, tmp_path):
    app = typer.Typer()
    app.command()(attention.compare)
    done = CliRunner().invoke(app, ["--quick", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("attention-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["heads"] for row in rows] == list(attention.HEADS)
    assert all(row["ours_s"] > 0 and row["torch_s"] > 0 and row["put_s"] > 0 and row["update_s"] > 0 for row in rows)


def test_a_slower_row_breaks_the_promise(attention):
    row = {"heads": "some", "tokens": 64, "nbytes": 1, "ours_s": 1.0, "torch_s": 2.0, "put_s": 2e-6, "update_s": 3e-6}
    assert [kept for _, kept in attention.verdicts({"rows": [row]})] == [True, True]
    assert [kept for _, kept in attention.verdicts({"rows": [row, row | {"torch_s": 0.9}]})] == [False, True]
    assert [kept for _, kept in attention.verdicts({"rows": [row, row | {"update_s": 0.9e-6}]})] == [True, False]
    assert attention.table({"rows": [row]}).rows[0][-3:] == ["2.0", "2", "3"]
