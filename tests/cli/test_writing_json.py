import json
import math

import pytest

from transformers_moe_offload.cli.writing import write_json
from transformers_moe_offload.errors import CheckpointError


def test_what_is_written_is_read_again_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "result.json"
    for result in ({"tokens_per_s": 5.5}, {"tokens_per_s": 6.5, "note": "größer"}):
        write_json(path, result)
        assert json.loads(path.read_text(encoding="utf-8")) == result
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_is_no_json_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"good": 1})
    with pytest.raises(TypeError):
        write_json(path, {"bad": {math.pi, 1}})
    assert json.loads(path.read_text()) == {"good": 1}


def test_a_file_that_cannot_be_replaced_is_an_error_that_leaves_nothing_behind(tmp_path):
    taken = tmp_path / "result.json"
    taken.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*result\.json"):
        write_json(taken, {"tokens_per_s": 5.5})
    assert list(tmp_path.iterdir()) == [taken]
