"""Programs, each in a process of its own that has imported already what takes long.

Most of what a small program takes is the import of torch and Transformers. Here a process that has done that forks for
each of them. `tox -e users` starts them from nothing, as users do.
"""

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

TORCH = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor", "scipy.optimize")
"""For programs whose variables Hugging Face's libraries read when they are imported, or that lack the package."""
EVERYTHING = (
    *TORCH,
    "transformers.models.auto.modeling_auto",
    "peft",
    "transformers_moe_offload",
    "moe_offload_cli.main",
)


def run_program(
    *command: object,
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
    imported: tuple[str, ...] = EVERYTHING,
) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT`, `python -c CODE`, `python -m MODULE` or a console script, with arguments, to its end.

    `variables` are added to the environment; what the programs reads is empty.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = _server(imported)
        request = {
            "command": words,
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ) | dict(variables or {}),
            "out": str(out),
            "err": str(err),
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process that forks has ended with status {process.wait()}"
        return subprocess.CompletedProcess(words, int(answer), out.read_text("utf-8"), err.read_text("utf-8"))


@cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen:
    code = f"import sys; sys.path[:] = {sys.path!r}; from programs import _serve; _serve({imported!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.stdin.close)
    return process


def _serve(imported: tuple[str, ...]) -> None:
    """Fork for each request, one after the other, until there are no more."""
    for name in imported:
        import_module(name)
    gc.freeze()
    for request in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                status = _status_of(**json.loads(request))
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)  # to take apart what was imported takes seconds
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _status_of(command: list[str], **where: Any) -> int:
    """Run a program and return the status that it ends with."""
    try:
        _take_place(**where)
        _run(*command)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _take_place(cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    sys.path[:] = [entry for entry in sys.path if Path(entry).name != "tests"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in ((0, os.devnull), (1, out), (2, err)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for descriptor, mode in ((0, "r"), (1, "w"), (2, "w"))
    )


def _run(program: str, *arguments: str) -> None:
    if program != "python":
        (script,) = metadata.entry_points(group="console_scripts", name=program)
        sys.argv = [program, *arguments]
        sys.exit(script.load()())
    match arguments:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path.insert(0, "")
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *rest]:
            sys.argv = ["-m", *rest]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
