"""The documentation keeps its word: examples run and print what the page says, and what it names exists.

A block of Python is run in the namespace of its page, in a folder that has `examples/` in it and nothing else. If a
block of text follows, that is what it must have printed, where `...` stands for anything. Blocks of bash are run line
by line. `users/pages.py` tells which blocks are left alone; `tox -e users` runs more of them.
"""

import configparser
import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import tomllib
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest
import transformers

from programs import run_program
from transformers_moe_offload import OffloadConfig
from users.pages import CHANGES_THE_ENVIRONMENT, NEEDS_A_DOWNLOAD, Block, blocks_of
from zoo.catalogue import SINCE
from zoo.inventory import NOT_TOKEN_ROUTED, moe_model_dirs

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "transformers_moe_offload"
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [*sorted(ROOT.glob("*.md")), ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
]

MOST_TITLED = 5
TOX = "python3 -m venv .venv && .venv/bin/pip install -q tox"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pages_with_blocks() -> list[str]:
    return [page for page in PAGES if runnable(page)]


def runnable(page: str) -> list[Block]:
    return [
        block
        for block in blocks_of(page)
        if block.not_run is None and block.environment is None and block.title != CHANGES_THE_ENVIRONMENT
    ]


def assert_printed(block: Block, printed: str) -> None:
    if block.printed is not None:
        matches = OutputChecker().check_output(block.printed, printed, ELLIPSIS | NORMALIZE_WHITESPACE)
        assert matches, f"{block.place} prints\n{printed}\nand not\n{block.printed}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder in which the paths of the documentation lead to the examples, and may be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with_blocks())
def test_a_page_runs_from_top_to_bottom_and_prints_what_it_says(page, folder):
    namespace = {"__name__": "__main__"}
    for block in runnable(page):
        if block.language == "python":
            # Padded, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            assert_printed(block, printed.getvalue())
        else:
            assert_printed(block, "".join(run(command, block.place) for command in block.text.splitlines()))


def run(command: str, place: str) -> str:
    program, *arguments = shlex.split(command)
    assert program in ("python", "moe-offload"), f"{place}: no test can run {command!r}"
    done = run_program(program, *arguments, variables={"COLUMNS": "80"})
    assert done.returncode == 0, f"{place}: {command} failed\n{done.stdout}{done.stderr}"
    return done.stdout


def test_few_blocks_are_not_run_and_all_of_them_say_why():
    titled = [block for page in PAGES for block in blocks_of(page) if block.title is not None]
    assert {block.title for block in titled} <= {NEEDS_A_DOWNLOAD, CHANGES_THE_ENVIRONMENT}
    assert len(titled) <= MOST_TITLED


def test_the_first_screen_of_the_readme_has_two_commands_and_each_is_enough():
    first_screen = read("README.md").partition("\n## ")[0]
    commands = [
        line for block in blocks_of("README.md") if block.language == "bash" for line in block.text.splitlines()
    ]
    assert [command for command in commands if command in first_screen] == [
        f"{TOX} && .venv/bin/tox -e demo",
        f"{TOX} && .venv/bin/tox p",
    ]


def test_ci_runs_the_test_command_of_the_readme():
    assert f"'{TOX} && .venv/bin/tox p'\n" in read(".ci/run")


def test_the_test_command_runs_everything_that_can_run_anywhere():
    config = tox_ini()
    env_list = config["tox"]["env_list"].split(", ")
    assert sorted(env_list) == ["docs", "layers", "lint", "oldest", "py311"]
    assert "examples{/}demo.py" in config["testenv:demo"]["commands"]
    assert config["testenv"]["commands"].split()[:2] == ["mypy", "pytest"], "py311 has no section of its own"


def test_every_tox_env_that_is_named_exists():
    known = {name.removeprefix("testenv:") for name in tox_ini().sections() if name.startswith("testenv:")}
    named = {
        name for page in PAGES for names in re.findall(r"tox -e ([\w,]+)", read(page)) for name in names.split(",")
    }
    named |= set(re.findall(r"^\| `(\w+)`", read("CONTRIBUTING.md"), re.M))
    assert {name for name in named if not re.fullmatch(r"py3\d+", name)} <= known
    assert {"demo", "docs", "layers", "lint", "py311", "types", "gpu", "bench"} <= named


def tox_ini() -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini", encoding="utf-8")
    return config


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/")])
def test_links_between_files_lead_somewhere(page):
    """MkDocs checks those inside of `docs`."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", read(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_options_in_the_documentation_are_those_of_the_config():
    defaults = {field.name: repr(field.default).replace("'", '"') for field in dataclasses.fields(OffloadConfig)}
    assert dict(option_rows("docs/configuration.md")) == defaults
    assert dict(option_rows("README.md")).items() <= defaults.items()


def option_rows(page: str) -> list[tuple[str, str]]:
    table = read(page).partition("| option | default |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, re.M)


def test_the_list_of_supported_models_is_that_of_the_installed_transformers():
    page = read("docs/supported-models.md")
    listed = " ".join(line.removeprefix("> ") for line in page.splitlines() if line.startswith("> "))
    supported = listed.split(", ")
    version, number = re.search(
        r"architecture of Transformers (5\.\d+) that routes tokens to experts, (\d+) in all", page
    ).groups()
    assert int(number) == len(supported)
    assert f"every token-routed MoE of Transformers {version} | {number} architectures" in read("README.md")
    installed = [int(part) for part in transformers.__version__.split(".")[:2]]
    to_come = {name for name, since in SINCE.items() if installed < [int(part) for part in since.split(".")]}
    assert sorted({*moe_model_dirs(), *to_come} - set(NOT_TOKEN_ROUTED)) == supported


def test_the_tree_in_the_documentation_is_the_tree():
    """It shows every folder of the package; one of which it shows files, it shows with all of them."""
    shown = {path for path in paths_of_the_tree() if path.suffix == ".py"}
    folders = set(paths_of_the_tree()) - shown
    assert [path for path in paths_of_the_tree() if not (SOURCES / path).exists()] == []
    assert {path.relative_to(SOURCES) for path in SOURCES.iterdir() if (path / "__init__.py").exists()} <= folders
    for folder in {path.parent for path in shown}:
        there = {path.relative_to(SOURCES) for path in (SOURCES / folder).glob("*.py")}
        if folder != Path():
            there.discard(folder / "__init__.py")
        assert {path for path in shown if path.parent == folder} == there
        inside = {path.parent.relative_to(SOURCES) for path in (SOURCES / folder).glob("*/__init__.py")}
        assert inside <= folders


def paths_of_the_tree() -> list[Path]:
    """The files and folders that the documentation's tree shows, relative to the package."""
    tree = read("docs/architecture.md").partition("## The tree")[2].partition("## The layers")[0]
    found, above = [], []
    for bars, name in re.findall(r"^([│ ]*)[├└]── ([\w/]+(?:\.py)?)", tree, re.M):
        above = [*above[: len(bars) // 4], name]
        found.append(Path(*above))
    return found


def test_the_layers_in_the_documentation_are_those_that_are_checked():
    contract = pyproject()["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = read("docs/architecture.md").partition("## The layers")[2].partition("```text\n")[2].partition("```")[0]
    assert shown.splitlines() == [layer.replace("transformers_moe_offload.", "") for layer in contract]


def test_the_pictures_are_what_their_script_draws():
    drawn = {name: draw() for name, draw in runpy.run_path(str(ROOT / "docs/pictures/draw.py"))["PICTURES"].items()}
    assert {path.name for path in (ROOT / "docs/pictures").glob("*.svg")} == drawn.keys()
    stale = [name for name in drawn if read(f"docs/pictures/{name}") != drawn[name]]
    assert stale == [], "run `python docs/pictures/draw.py`"


def test_pictures_fetch_nothing_from_elsewhere():
    for path in (ROOT / "docs/pictures").glob("*.svg"):
        assert not re.search(r"href|url\(|@import|<script|<image", path.read_text("utf-8"))


def test_every_dependency_has_its_reason():
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in pyproject()["project"]["dependencies"]}
    reasons = re.findall(r"^\| `([\w-]+)` \|", read("docs/decisions/0002-dependencies.md"), re.M)
    assert set(reasons) == names


def pyproject() -> dict:
    return tomllib.loads(read("pyproject.toml"))
