"""Two processes that share the files learn what one learns with batches of twice the size, and evaluate alike."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from programs import run_program

from .conftest import TINY_MOE

SCRIPT = Path(__file__).parent / "data_parallel.py"
TORCHRUN = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
MPIRUN = ["--num_machines", "1", "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "2"],
    "accelerate with mpirun": ["python", "-m", "accelerate.commands.launch", *MPIRUN],
}
"""Those without MPI are tried by `tox -e users` too, as the guide has them."""
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def run(launch, model, other, folder, batch):
    """What each process has written down, by its number, and how it evaluated."""
    output = folder / "output"
    output.mkdir()
    (folder / "hosts").write_text("localhost slots=2\n")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = run_program(*launch, SCRIPT, model, other, output, batch, cwd=folder, variables=as_root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {file.stem: json.loads(file.read_text()) for file in output.glob("*.json")}
    evaluation = found.pop("evaluation")
    return [found[number] for number in sorted(found)], evaluation


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate with mpirun", marks=needs_mpi)])
def test_two_processes_have_the_losses_of_one_with_twice_the_batch_and_evaluate_what_one_does(
    launcher, checkpoint, tmp_path_factory
):
    folders = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    alone, (_, losses) = run(["python"], TINY_MOE, checkpoint, folders[0], batch=4)
    found, (wrapper, losses_together) = run(LAUNCHERS[launcher], TINY_MOE, checkpoint, folders[1], batch=2)
    assert [facts["world_size"] for facts in (*alone, *found)] == [1, 2, 2]
    assert found[0]["losses"] == pytest.approx(alone[0]["losses"], rel=1e-3)
    assert found[0]["trained"] == found[1]["trained"], "gradients were not synchronised"
    if sys.platform == "linux":
        slots = [facts["slot_bytes"] for facts in found]
        assert all(facts["shared_bytes"] >= 0.9 * min(slots) > 0 for facts in found), "experts are not shared"
    assert wrapper == "DistributedDataParallel"
    assert losses_together == losses
    assert len(set(losses)) == 8
