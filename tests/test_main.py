"""Programs based on Transformers are run with the plugin imported, as lm-evaluation-harness needs it."""

from programs import TORCH, run_program

PROGRAM = """
import sys
from transformers import PreTrainedModel
print(sys.argv[1:], getattr(PreTrainedModel.from_pretrained, "_is_of_moe_offload", False), __name__)
"""


def run(*arguments, folder, **options):
    return run_program("python", "-m", "transformers_moe_offload", *arguments, cwd=folder, **options)


def test_a_program_gets_its_own_arguments_and_the_plugin(tmp_path):
    (tmp_path / "some_program.py").write_text(PROGRAM)
    done = run("some_program", "--model_args", "moe_offload=auto", folder=tmp_path, imported=TORCH)
    assert done.stdout == "['--model_args', 'moe_offload=auto'] True __main__\n", done.stderr


def test_without_a_program_it_says_how_it_is_used(tmp_path):
    done = run(folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python -m transformers_moe_offload MODULE")


def test_a_program_that_is_not_installed_is_one_line(tmp_path):
    for module in ("no_such_program", "no_such_program.part"):
        done = run(module, "--help", folder=tmp_path)
        assert done.returncode == 1
        assert (
            done.stderr == "there is no module no_such_program in this environment; install it, or correct the name\n"
        )
