"""A device that this machine does not have is one line, before anything is loaded or read for it."""

import pytest
import torch

from .conftest import TINY_MOE, the_error

ABSENT = f"cuda:{torch.cuda.device_count()}"


@pytest.mark.parametrize("command", [("chat",), ("trace", "-o", "trace.npz")], ids=["chat", "trace"])
def test_a_model_is_not_loaded_for_a_device_that_is_not_there(run, tiny_moe, command):
    name, *options = command
    result = run(name, tiny_moe, *options, "--prompt", "x", "--device-map", ABSENT)
    error = the_error(result)
    assert f"--device-map {ABSENT} cannot be used here" in error
    assert "this machine has cpu" in error
    assert "Loading weights" not in result.stderr


@pytest.mark.parametrize(
    ("device", "message"),
    [(ABSENT, f"--device {ABSENT} cannot be used here"), ("gpu", "'gpu' is not a device")],
)
def test_a_mixture_is_not_planned_for_a_device_that_is_not_there(run, tmp_path, device, message):
    result = run("build", TINY_MOE.parents[1] / "adapters.yaml", tmp_path / "out", "--device", device)
    assert message in the_error(result)
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_loaded_where_nothing_is_computed(run, tiny_moe):
    error = the_error(run("chat", tiny_moe, "--prompt", "x", "--device-map", "meta"))
    assert "--device-map meta cannot be used here" in error


def test_what_is_no_device_is_left_to_transformers(run, tiny_moe):
    assert run("chat", tiny_moe, "--prompt", "x", "--max-new-tokens", "1", "--device-map", "auto").exit_code == 0
    assert "'balanced'" in the_error(run("chat", tiny_moe, "--prompt", "x", "--device-map", "gpu"))
