"""Two processes that share the files learn what one learns with batches of twice the size, and evaluate alike."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import TINY_MOE

SCRIPT = Path(__file__).parent / "data_parallel.py"
EVALUATION = Path(__file__).parent / "evaluation_in_parallel.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "2"],
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "accelerate with mpirun": [*ACCELERATE, "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts"],
}
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def launched(launch, script, *arguments, folder):
    """Run a script to its end, in a folder."""
    (folder / "hosts").write_text("localhost slots=2\n")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = os.environ | as_root | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}
    command = [str(part) for part in (*launch, script, *arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(launch, folder, batch):
    """What each process has written down, by its number."""
    output = folder / "output"
    output.mkdir()
    launched(launch, SCRIPT, TINY_MOE, output, batch, folder=folder)
    return {int(file.stem): json.loads(file.read_text()) for file in output.iterdir() if file.stem.isdigit()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process learns."""
    return trained([sys.executable], tmp_path_factory.mktemp("alone"), batch=4)


@pytest.mark.parametrize(
    "launcher", ["torchrun", "accelerate", pytest.param("accelerate with mpirun", marks=needs_mpi)]
)
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(launcher, alone, tmp_path):
    found = trained(LAUNCHERS[launcher], tmp_path, batch=2)
    assert [facts["world_size"] for facts in (*alone.values(), *found.values())] == [1, 2, 2]
    assert found[0]["losses"] == pytest.approx(alone[0]["losses"], rel=1e-3)
    assert found[0]["trained"] == found[1]["trained"], "gradients were not synchronised"
    if sys.platform == "linux":
        slots = [facts["slot_bytes"] for facts in found.values()]
        assert all(facts["shared_bytes"] >= 0.9 * min(slots) > 0 for facts in found.values()), "experts are not shared"


def test_without_a_hostfile_accelerate_starts_one_process_on_a_cpu(tmp_path):
    """As docs/finetuning.md says; when this fails, accelerate has learnt to, and the docs can be shorter."""
    found = trained([*ACCELERATE, "--cpu", "--num_processes", "2"], tmp_path, batch=2)
    assert [facts["world_size"] for facts in found.values()] == [1]


def test_two_processes_that_accelerate_has_prepared_evaluate_what_one_does(checkpoint, tmp_path):
    found = []
    for number in ("1", "2"):
        launched([*TORCHRUN, number], EVALUATION, checkpoint, tmp_path / number, folder=tmp_path)
        found.append(json.loads((tmp_path / number).read_text()))
    (_, alone), (wrapper, together) = found
    assert wrapper == "DistributedDataParallel"
    assert together == alone
    assert len(set(alone)) == 8
