"""One user's walk, in order: install the wheel, read every page and do what it says, add the extras, run the examples,
and load what was written on a machine without the package.

Tests follow one another as they stand here, in one environment.
"""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from cli.wrong_inputs import CASES, expect_refusal, fill
from users.pages import Block, blocks_of, pages

pytestmark = pytest.mark.timeout(7200)

READER = (Path(__file__).parent / "reader.py").read_text("utf-8")
NOT_HERE = "clients"
"""Blocks of that environment are run in `test_clients.py`."""
MOST_NOT_RUN = 6


@pytest.fixture(scope="session")
def workplace(clone, tmp_path_factory):
    """Makes folders to work in, from which `examples/` can be seen as in a clone."""

    def workplace() -> Path:
        folder = tmp_path_factory.mktemp("reader")
        (folder / "examples").symlink_to(clone / "examples", target_is_directory=True)
        return folder

    return workplace


@pytest.fixture(scope="session")
def written(user, workplace) -> Path:
    """A folder with a checkpoint of each kind that the package writes, and a trace."""
    folder = workplace()
    for command in (
        "moe-offload build examples/clown_car.yaml mixture",
        "moe-offload build examples/adapters.yaml adapters",
        "moe-offload quantize examples/models/tiny-moe low-bits --experts 4x32 --dense 8x64",
        "moe-offload trace examples/models/tiny-moe -o trace.npz --prompt int --max-new-tokens 8",
    ):
        done = user.run(*command.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr.lower(), "the first build of the models that ship is quiet"
        assert "tokens to calibrate" not in done.stderr
    return folder


# Without extras.


def test_the_package_is_not_that_of_the_checkout(user, wheel, workplace):
    found = user.python("import transformers_moe_offload as found; print(found.__file__)", cwd=workplace())
    assert Path(found.strip()).is_relative_to(user.folder)
    assert wheel.stem.split("-")[1] in user.expect("moe-offload", "--version", cwd=workplace())


NEEDS = {
    "plots": ("moe-offload", "report", "trace.npz", "-o", "plots"),
    "research": (
        "python", "-c",
        "import torch\nfrom transformers import AutoModelForCausalLM\nfrom transformers_moe_offload import routing\n"
        "model = AutoModelForCausalLM.from_pretrained('examples/models/tiny-moe', moe_offload=True)\n"
        "with routing.record_routing(model) as recorder, torch.no_grad(): model(torch.arange(9)[None])\n"
        "assert len(recorder.trace.to_pandas()) == recorder.trace.to_arrow().num_rows == 9 * 8\n"
        "with routing.set_routing(model, 'linear_assignment'), torch.no_grad(): model(torch.arange(9)[None])\n",
    ),
    "adapters": (
        "python", "-c",
        "import torch\nfrom transformers import AutoModelForCausalLM\nfrom transformers_moe_offload import training\n"
        "model = AutoModelForCausalLM.from_pretrained('examples/models/tiny-moe', moe_offload=True)\n"
        "config = training.lora_config(model, r=2)\n"
        "from peft import get_peft_model\n"
        "ids = torch.arange(9)[None]\n"
        "get_peft_model(model, config)(ids, labels=ids).loss.backward()\n",
    ),
    "datasets": (
        "python", "-c",
        "import pathlib\nfrom transformers_moe_offload.builder import MoeRecipe, build_moe\n"
        "pathlib.Path('passages').mkdir(exist_ok=True)\n"
        "pathlib.Path('passages/train.jsonl').write_text('{\"text\": \"it is a truth\"}\\n' * 400)\n"
        "pathlib.Path('c.txt').write_text('int main(void);\\n' * 400)\n"
        "texts = {'c': 'c.txt', 'prose': {'path': 'passages', 'split': 'train'}}\n"
        "experts = [{'name': name, 'source': {'adapter': f'examples/models/tiny-dense-{name}'}, 'dataset': text}\n"
        "           for name, text in texts.items()]\n"
        "recipe = {'schema': 1, 'base_model': 'examples/models/tiny-dense', 'experts': experts}\n"
        "build_moe(MoeRecipe.from_dict(recipe), 'of-a-data-set')\n",
    ),
}  # fmt: skip
"""What each extra is for."""


@pytest.mark.parametrize("extra", NEEDS)
def test_what_needs_an_extra_names_it(user, written, extra):
    done = user.run(*NEEDS[extra], cwd=written)
    assert done.returncode != 0
    assert f"transformers-moe-offload[{extra}]" in done.stderr


@pytest.mark.parametrize(("command", "message"), CASES, ids=lambda text: text[:40])
def test_a_wrong_input_is_one_clear_error(user, tmp_path, command, message):
    fill(tmp_path)
    done = user.run("moe-offload", *command.split(), cwd=tmp_path, variables={"COLUMNS": "400"})
    expect_refusal(done.returncode, done.stderr, message)


# The pages, in the order in which they are read.


@pytest.mark.parametrize("page", pages())
def test_a_page_can_be_followed_from_top_to_bottom(user, workplace, wheel, page):
    blocks = [block for block in blocks_of(page) if block.not_run is None and block.environment is None]
    given = json.dumps([as_read(block, wheel) for block in blocks])
    user.expect("python", "-c", READER, cwd=workplace(), given=given)


def as_read(block: Block, wheel: Path) -> dict[str, object]:
    """A block, with the wheel where the page installs the clone that it was built from."""
    text = re.sub(r"pip install '?\.(\[[\w,]+\])?'?(?=\s)", rf"pip install -q '{wheel}\1'", block.text)
    return block.as_dict() | {"text": text}


def test_few_blocks_are_left_out_and_all_of_them_say_why():
    left_out = [block for page in pages() for block in blocks_of(page) if block.not_run is not None]
    assert all(len(block.not_run or "") > 10 for block in left_out)
    assert len(left_out) <= MOST_NOT_RUN
    assert {block.environment for page in pages() for block in blocks_of(page)} == {None, NOT_HERE}


# With extras, one after the other.


@pytest.mark.parametrize("extra", NEEDS)
def test_an_extra_brings_what_it_promises(user, wheel, written, extra):
    user.install(f"{wheel}[{extra}]")
    user.expect(*NEEDS[extra], cwd=written)


# The examples, in the order of their table.


@pytest.fixture(scope="session")
def of_examples(user, wheel, workplace) -> Path:
    user.install(f"{wheel}[examples]")
    return workplace()


FEWER = {
    "demo.py": ["--max-new-tokens", "20"],
    "routing.py": ["--windows", "1"],
    "finetune_router.py": ["--steps", "6"],
    "finetune_experts_lora.py": ["--steps", "6"],
    "finetune_chosen_experts.py": ["--steps", "6"],
}
"""What makes an example shorter than it is."""


def listed(clone: Path) -> list[str]:
    return re.findall(r"^\| \[`([\w./]+)`\]", (clone / "examples" / "README.md").read_text("utf-8"), re.M)


def test_the_examples_run_in_the_order_of_their_table(user, clone, of_examples):
    names = listed(clone)
    assert [name for name in names if name.endswith(".py")] == [name for name in names if name in FEWER]
    for name in names:
        if name.endswith(".py"):
            user.expect("python", f"examples/{name}", *FEWER[name], cwd=of_examples)
        elif name.endswith(".yaml"):
            user.expect("moe-offload", "build", f"examples/{name}", Path(name).stem, cwd=of_examples)


def test_what_an_example_has_written_is_its_own(user, of_examples):
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model, trouble = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(trouble.values()), trouble\n"
        "assert not getattr(model, '_hf_peft_config_loaded', False)\n"
    )
    for folder in ("finetuned-router", "finetuned-experts"):
        user.python(code, folder, cwd=of_examples)


# What others have damaged, or made to do harm.


def test_damaged_files_of_every_format_are_refused(user, wheel, clone, of_examples):
    """For two minutes, and by other cases every day."""
    user.install(f"{wheel}[research]", "pytest")
    count = ("--cases", 28_000, "--seed", f"{date.today():%Y%m%d}")
    user.expect("python", "-m", "fuzz.fuzzing", *count, cwd=of_examples, PYTHONPATH=str(clone / "tests"))


# A machine without the package.


@pytest.fixture(scope="session")
def stranger(user, written, of_examples):
    expected = (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "for name in ('adapters', 'mixture'):\n"
        "    model = AutoModelForCausalLM.from_pretrained(name)\n"
        "    with torch.no_grad(): torch.save(model(torch.arange(9)[None]).logits, name + '.pt')\n"
    )
    user.python("import transformers_moe_offload\n" + expected, cwd=written)
    user.uninstall("transformers-moe-offload")
    return user


def loaded(name: str) -> str:
    return (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)\n"
        f"with torch.no_grad(): logits = model(torch.arange(9)[None]).logits\n"
        f"assert torch.equal(logits, torch.load({name!r} + '.pt'))\n"
    )


@pytest.mark.parametrize("name", ["adapters", "mixture"])
def test_a_mixture_loads_for_somebody_without_the_package(stranger, written, name):
    stranger.python(loaded(name), cwd=written, HF_MODULES_CACHE=str(written / "modules"))


def test_a_low_bit_checkpoint_tells_somebody_without_the_package_what_is_missing(stranger, written):
    done = stranger.run("python", "-c", loaded("low-bits"), cwd=written)
    assert done.returncode != 0
    assert "pip install transformers-moe-offload" in done.stderr
    without_trust = loaded("low-bits").replace(", trust_remote_code=True", ", trust_remote_code=False")
    assert stranger.run("python", "-c", without_trust, cwd=written).returncode != 0


def test_an_adapter_that_was_trained_on_offloaded_experts_loads_for_somebody_without_the_package(stranger, of_examples):
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        "plain = AutoModelForCausalLM.from_pretrained('examples/models/tiny-moe')\n"
        "PeftModel.from_pretrained(plain, 'finetuned-lora')\n"
    )
    stranger.python(code, cwd=of_examples)
