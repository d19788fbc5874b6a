"""Two processes that share the files learn what one learns with batches of twice the size, and evaluate alike."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from programs import TORCH, run_program

from .conftest import TINY_MOE

SCRIPT = Path(__file__).parent / "data_parallel.py"
EVALUATION = Path(__file__).parent / "evaluation_in_parallel.py"
TORCHRUN = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
MPIRUN = ["--num_machines", "1", "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "2"],
    "accelerate with mpirun": ["python", "-m", "accelerate.commands.launch", *MPIRUN],
}
"""Those without MPI are tried by `tox -e users` too, as the guide has them."""
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def launched(launch, script, *arguments, folder):
    """Run a script to its end, in a folder."""
    (folder / "hosts").write_text("localhost slots=2\n")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    variables = as_root | {"HF_HOME": str(folder)}
    done = run_program(*launch, script, *arguments, cwd=folder, variables=variables, imported=TORCH)
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
    return trained(["python"], tmp_path_factory.mktemp("alone"), batch=4)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate with mpirun", marks=needs_mpi)])
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(launcher, alone, tmp_path):
    found = trained(LAUNCHERS[launcher], tmp_path, batch=2)
    assert [facts["world_size"] for facts in (*alone.values(), *found.values())] == [1, 2, 2]
    assert found[0]["losses"] == pytest.approx(alone[0]["losses"], rel=1e-3)
    assert found[0]["trained"] == found[1]["trained"], "gradients were not synchronised"
    if sys.platform == "linux":
        slots = [facts["slot_bytes"] for facts in found.values()]
        assert all(facts["shared_bytes"] >= 0.9 * min(slots) > 0 for facts in found.values()), "experts are not shared"


def test_two_processes_that_accelerate_has_prepared_evaluate_what_one_does(checkpoint, tmp_path):
    found = []
    for number, launch in (("1", ["python"]), ("2", [*TORCHRUN, "2"])):
        launched(launch, EVALUATION, checkpoint, tmp_path / number, folder=tmp_path)
        found.append(json.loads((tmp_path / number).read_text()))
    (_, alone), (wrapper, together) = found
    assert wrapper == "DistributedDataParallel"
    assert together == alone
    assert len(set(alone)) == 8
