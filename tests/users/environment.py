"""A fresh environment outside of the checkout, and what is run in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from users.pages import ROOT

LONGEST_S = 1800
"""Of one command; what hangs is a failure, and what is slow on a busy machine is not."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment whose programs come first."""

    folder: Path

    @classmethod
    def fresh(cls, folder: Path) -> "Environment":
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        return cls(folder)

    def program(self, name: str) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / name

    @property
    def variables(self) -> dict[str, str]:
        """Ours, without what leads back to the checkout, and with nothing but this machine to download from."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return kept | {
            "PATH": f"{self.program('python').parent}{os.pathsep}{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "COLUMNS": "80",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "HF_HOME": str(self.folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
        }

    def install(self, *what: str) -> None:
        # Of these thousands of modules few are imported; those are compiled then.
        self.expect("python", "-m", "pip", "install", "-q", "--no-compile", *what, cwd=self.folder)

    def uninstall(self, what: str) -> None:
        self.expect("python", "-m", "pip", "uninstall", "-q", "-y", what, cwd=self.folder)

    def run(
        self, *command: object, cwd: Path, given: str | None = None, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of it; what it reads is `given`."""
        program, *arguments = (str(word) for word in command)
        path = shutil.which(program, path=self.variables["PATH"])
        assert path is not None, f"there is no {program} in {self.folder}"
        return subprocess.run(
            [path, *arguments],
            cwd=cwd,
            env=self.variables | (variables or {}),
            input=given or "",
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )

    def expect(self, *command: object, cwd: Path, given: str | None = None, **variables: str) -> str:
        """The same for what must succeed; returns what it has printed."""
        done = self.run(*command, cwd=cwd, given=given, variables=variables)
        words = " ".join(map(str, command))
        assert done.returncode == 0, f"{words[:300]}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done.stdout

    def python(self, code: str, *arguments: object, cwd: Path, **variables: str) -> str:
        return self.expect("python", "-c", code, *arguments, cwd=cwd, **variables)
