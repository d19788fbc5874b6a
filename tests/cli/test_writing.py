"""Ctrl-C while a checkpoint is written: one line says what is left, and the same command goes on from that."""

import json

import pytest
from rich.progress import Progress

from .conftest import TINY_MOE

MODELS = TINY_MOE.parent


@pytest.fixture
def interrupted(monkeypatch):
    """Press Ctrl-C when the first bytes have been written; undone by calling it."""

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        yield patch.undo


@pytest.fixture
def building(tmp_path):
    """Arguments that build a small mixture into a folder."""
    experts = [{"name": name, "source": {"adapter": str(MODELS / f"tiny-dense-{name}")}} for name in ("c", "prose")]
    recipe = {"schema": 1, "base_model": str(MODELS / "tiny-dense"), "gate": {"mode": "noise"}, "experts": experts}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return lambda folder: ("build", tmp_path / "recipe.yaml", folder)


def quantizing(folder):
    """Arguments that quantize a small model into a folder."""
    return "quantize", TINY_MOE, folder, "--experts", "4x32", "--no-optimize"


def said_in(result) -> str:
    """The line that an interrupted command leaves on stderr."""
    assert result.exit_code == 130, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("interrupted")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_an_interrupted_build_names_what_it_has_left_and_goes_on(run, building, interrupted, tmp_path):
    said = said_in(run(*building(tmp_path / "moe")))
    assert said == (
        f"interrupted; run the same command again to go on from what is in {tmp_path / '.moe.new'}, or remove that"
    )
    interrupted()
    assert run(*building(tmp_path / "moe")).exit_code == 0
    assert not (tmp_path / ".moe.new").exists()


def test_without_resume_the_same_command_would_not_go_on(run, building, interrupted, tmp_path):
    said = said_in(run(*building(tmp_path / "moe"), "--no-resume"))
    assert "run the command again without --no-resume to go on" in said


def test_an_interrupted_quantization_names_its_own_folder_or_the_one_beside_it(run, interrupted, tmp_path):
    said = said_in(run(*quantizing(tmp_path / "low")))
    assert f"to go on from what is in {tmp_path / 'low'}, or remove that" in said
    interrupted()
    assert run(*quantizing(tmp_path / "low")).exit_code == 0


def test_a_complete_checkpoint_is_not_said_to_be_unfinished(run, interrupted, tmp_path, monkeypatch):
    interrupted()
    assert run(*quantizing(tmp_path / "low")).exit_code == 0

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_moe_offload.hf.prebuilt.quantize.write_prebuilt", interrupt)
    assert said_in(run(*quantizing(tmp_path / "low"), "--overwrite")) == "interrupted"
