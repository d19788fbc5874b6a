"""What is written can be published: it names no folder of this machine, and none of its files."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from moe_offload_cli.main import app
from transformers_moe_offload.builder import add_expert, bake_adapters, drop_expert, merge_to_dense
from transformers_moe_offload.builder.recipe import Expert

MODELS = Path(__file__).parents[2] / "examples" / "models"
SECRET = "folder-of-somebody"
"""Part of every path: of the working folder, the home, the models and what is written."""
REMEMBERED = {
    "config.json": "_name_or_path",
    "generation_config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
    "adapter_config.json": "base_model_name_or_path",
}
TEXTS = {
    "c": "static int size(const struct list *list)\n{\n    return list->size;\n}\n",
    "python": "class List:\n    def __len__(self):\n        return len(self._items)\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with models that remember where they were loaded from, as Transformers and PEFT let them."""
    home = tmp_path_factory.mktemp(SECRET)
    for name in ("tiny-dense", "tiny-dense-c", "tiny-dense-python", "tiny-moe"):
        shutil.copytree(MODELS / name, home / name)
        for file, key in REMEMBERED.items():
            if (home / name / file).is_file():
                settings = json.loads((home / name / file).read_text())
                (home / name / file).write_text(json.dumps(settings | {key: str(home / "tiny-dense")}))
        (home / name / "credentials.json").write_text('{"key": "folder-of-somebody"}')
    for name, text in TEXTS.items():
        (home / f"{name}.txt").write_text(text * 30)
    return home


def recipe(home, **more) -> str:
    experts = [
        {"name": name, "source": {"adapter": str(home / f"tiny-dense-{name}")}, "dataset": str(home / f"{name}.txt")}
        for name in TEXTS
    ]
    file = home / f"{more.get('kind', 'moe')}.json"
    content = {"schema": 1, "base_model": str(home / "tiny-dense"), "experts_per_token": 1, "experts": experts, **more}
    file.write_text(json.dumps(content))
    return str(file)


def run(*arguments: object) -> Result:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def assert_says_nothing_of(home, folder) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert [file.name for file in files if SECRET.encode() in file.read_bytes()] == []
    assert [file.name for file in files if file.name == "credentials.json"] == []


def test_a_mixture_its_edits_and_a_dense_model_of_it(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    run("build", recipe(home), home / "mixture")
    assert_says_nothing_of(home, home / "mixture")
    more = Expert(source=f"+{home / 'tiny-dense-c'}", name="more", positive_prompts=[TEXTS["c"] * 30])
    add_expert(home / "mixture", more, base=str(home / "tiny-dense"), out=home / "added")
    assert_says_nothing_of(home, home / "added")
    drop_expert(home / "mixture", 1, out=home / "dropped")
    assert_says_nothing_of(home, home / "dropped")
    merge_to_dense(home / "mixture", home / "dense", experts=0)
    assert_says_nothing_of(home, home / "dense")


def test_a_mixture_of_adapters_and_what_is_baked_of_it(home, monkeypatch):
    monkeypatch.chdir(home)
    run("build", recipe(home, kind="adapter_moe", adapter_moe={"router_per": "ffn"}), "adapters")
    assert_says_nothing_of(home, home / "adapters")
    bake_adapters(home / "adapters", home / "baked")
    assert_says_nothing_of(home, home / "baked")


def test_a_quantized_checkpoint(home, monkeypatch):
    monkeypatch.chdir(home)
    run("quantize", home / "tiny-moe", "quantized", "--experts", "4x32", "--no-optimize")
    assert_says_nothing_of(home, home / "quantized")
