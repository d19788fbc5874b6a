"""On what machine, with what software: without these a number is not a number."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "transformers-moe-offload")


def conditions(made: Path, num_threads: int | None) -> dict[str, object]:
    """Facts about this machine and this tree; `made` is where the model's files are."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],
        "os": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(made),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "omp_num_threads": num_threads or os.environ.get("OMP_NUM_THREADS"),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(path: Path) -> str:
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _commit() -> str:
    """The commit, and whether the tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "not a git checkout"
    return f"{commit} with local changes" if git("status", "--porcelain", "--untracked-files=no") else commit
