"""Walks through the package as its users take them; run by `tox -e users`, and left out of every other run.

The wheel is built once. `--record FILE` writes what was found, with date and versions.
"""

import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from users.environment import Environment
from users.pages import ROOT, all_blocks

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    """These tests take long, so they run only where this folder, or a file in it, is named."""
    named = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args]
    return None if any(path.is_relative_to(HERE) for path in named) else True


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The files of the repository as git has them, or will have them, in a folder of a user."""
    clone = tmp_path_factory.mktemp("user") / "transformers-moe-offload"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    return clone


@pytest.fixture(scope="session")
def wheel(clone, tmp_path_factory, request) -> Path:
    if request.config.getoption("wheel") is not None:
        return request.config.getoption("wheel").resolve()
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, clone], cwd=out, check=True)
    (wheel,) = out.glob("*.whl")
    shutil.rmtree(clone / "build", ignore_errors=True)
    return wheel


@pytest.fixture(scope="session")
def user(wheel, tmp_path_factory, request) -> Environment:
    """The package from its wheel, and nothing else; extras come as the walk goes on."""
    environment = Environment.fresh(tmp_path_factory.mktemp("environment"))
    environment.install(str(wheel))
    request.config.stash[_ENVIRONMENTS]["user"] = environment
    return environment


@pytest.fixture(scope="session")
def clients(wheel, tmp_path_factory, request) -> Environment:
    """The package among the programs that people use it from."""
    environment = Environment.fresh(tmp_path_factory.mktemp("clients"))
    environment.install(f"{wheel}[examples]", "lm_eval[hf]", "trl", "transformers[serving]")
    request.config.stash[_ENVIRONMENTS]["clients"] = environment
    return environment


# The record of a run.

_ENVIRONMENTS = pytest.StashKey[dict]()
_STARTED = pytest.StashKey[float]()
_COLLECTED = pytest.StashKey[int]()
_COMMIT = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addoption("--wheel", type=Path, help="walk with a wheel that has been built, instead of building one")
    parser.addoption("--record", type=Path, help="write what the walks have found to this file")


def pytest_configure(config):
    config.stash[_ENVIRONMENTS] = {}
    config.stash[_STARTED] = time.time()
    config.stash[_COLLECTED] = 0
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    config.stash[_COMMIT] = said.stdout.strip()


def pytest_collection_finish(session):
    session.config.stash[_COLLECTED] = len(session.items)


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("record")
    if path is None:
        return
    reports = [one for kind in ("passed", "failed", "error", "skipped") for one in terminalreporter.getreports(kind)]
    rows = [
        f"| {one.nodeid.partition('::')[2].replace('|', ' ')} | {one.outcome} | {one.duration:.0f} |"
        for one in sorted(reports, key=lambda one: one.nodeid)
        if one.when == "call" or one.outcome != "passed"
    ]
    blocks = all_blocks()
    left_out = [block for block in blocks if block.not_run is not None]
    versions = []
    for name, environment in config.stash[_ENVIRONMENTS].items():
        listed = environment.expect("python", "-m", "pip", "list", "--format=freeze", cwd=environment.folder)
        versions.append(f"- {name}: " + ", ".join(sorted(listed.split(), key=str.lower)))
    lines = [
        "# The last walk as users",
        "",
        f"`tox -e users`, {time.strftime('%Y-%m-%d %H:%M', time.gmtime(config.stash[_STARTED]))} UTC, commit "
        f"{config.stash[_COMMIT]}, Python {platform.python_version()}, {platform.platform()}. A wheel was built and "
        f"installed into fresh environments outside of the checkout; seconds are wall time.",
        "",
        f"{len(rows)} of {config.stash[_COLLECTED]} walks were taken.",
        "",
        f"Blocks on the pages: {len(blocks)}, of which {len(blocks) - len(left_out)} are run. The others:",
        "",
        *(f"- {block.place}: {block.not_run}" for block in left_out),
        "",
        "| walk | outcome | s |",
        "| --- | --- | ---: |",
        *rows,
        "",
        "What was installed:",
        "",
        *versions,
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
