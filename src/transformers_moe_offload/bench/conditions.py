"""The machine and the software of a measurement, without which its figures mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "transformers-moe-offload")


def conditions(files: Path | None = None, num_threads: int | None = None) -> dict[str, object]:
    """Facts about this machine and this tree.

    `files` is where the model's files are. `num_threads` is the OMP_NUM_THREADS of the measured process, if that is
    another one.
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ram_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(files) if files is not None else "unknown",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "omp_num_threads": num_threads or os.environ.get("OMP_NUM_THREADS"),
        "commit": _commit(),
    }


def described(conditions: dict[str, Any]) -> dict[str, str]:
    """The facts as lines of text."""
    gpu = f", {conditions['gpu']}" if conditions["gpu"] else ""
    load, ram_gib = conditions["load_average"], conditions["ram_bytes"] / 2**30
    return {
        "machine": f"{conditions['cpu']}, {conditions['cores']} cores, {ram_gib:.1f} GiB RAM{gpu}",
        "system": f"{conditions['os']}, files on {conditions['file_system']}, "
        f"load average {f'{load:.2f}' if isinstance(load, float) else 'unknown'} before",
        "software": ", ".join(f"{name} {number}" for name, number in conditions["packages"].items()),
        "commit": str(conditions["commit"]),
    }


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(path: Path) -> str:
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit, and whether the tree differs from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # no git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "not a git checkout"
    return f"{commit} with local changes" if git("status", "--porcelain", "--untracked-files=no") else commit
