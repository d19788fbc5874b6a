"""Two processes that share the files learn what one learns with batches of twice the size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "data_parallel.py"


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(checkpoint, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    curves = []
    for number, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(number)
        output.mkdir()
        command = [*launch, number, SCRIPT, checkpoint, output, batch]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        world_size, losses = json.loads((output / "losses.json").read_text())
        assert world_size == number
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
