"""Two processes that share the files learn what one learns with batches of twice the size, and evaluate alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "data_parallel.py"
EVALUATION = Path(__file__).parent / "evaluation_in_parallel.py"


def launched(number, script, *arguments, home):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(home)}
    command = [str(part) for part in (*launch, number, script, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(checkpoint, tmp_path):
    curves = []
    for number, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(number)
        output.mkdir()
        launched(number, SCRIPT, checkpoint, output, batch, home=tmp_path)
        world_size, losses = json.loads((output / "losses.json").read_text())
        assert world_size == number
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_two_processes_that_accelerate_has_prepared_evaluate_what_one_does(checkpoint, tmp_path):
    found = []
    for number in (1, 2):
        launched(number, EVALUATION, checkpoint, tmp_path / str(number), home=tmp_path)
        found.append(json.loads((tmp_path / str(number)).read_text()))
    (_, alone), (wrapper, together) = found
    assert wrapper == "DistributedDataParallel"
    assert together == alone
    assert len(set(alone)) == 8
