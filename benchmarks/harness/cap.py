"""Let a process have only so much memory, page cache included, so that the page cache cannot hide the disk.

The first of these that works here is taken, and says its name:

- a control group below this process's own (cgroup v2, then v1): the kernel charges it for what its processes allocate
  and for every page of a file that they are the first to read;
- `systemd-run --scope`, which asks systemd for such a group;
- a balloon: a process that allocates and locks all but so much of the RAM that is available. Then the cap holds for the
  whole machine, so nothing else should run on it.

`ulimit` is not among them: it does not count the page cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from transformers_moe_offload.errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")


class CapError(ConfigError):
    """Memory cannot be capped on this machine, with the reason for each way that was tried."""


@dataclass(frozen=True)
class Cap:
    """A limit for processes that are started under it."""

    name: str
    nbytes: int
    prefix: tuple[str, ...] = ()
    """What a command has to begin with."""
    join: Callable[[], None] | None = None
    """Called in the new process before the command begins."""
    peak: Callable[[], int | None] = field(default=lambda: None)
    """Most bytes charged so far, where the kernel says so."""


@contextmanager
def capped(nbytes: int, ways: tuple[Callable[[int], AbstractContextManager[Cap]], ...] = ()) -> Iterator[Cap]:
    """A cap of so many bytes, for as long as the block lasts; `CapError` if no way works."""
    reasons = []
    for way in ways or WAYS:
        opened = way(nbytes)
        try:
            cap = opened.__enter__()
        except (OSError, CapError) as error:
            reasons.append(f"{way.__name__.replace('_', ' ')}: {error}")
            continue
        try:
            yield cap
        finally:
            opened.__exit__(None, None, None)
        return
    raise CapError(
        f"memory cannot be capped at {nbytes:,} bytes here ({'; '.join(reasons)}); run this as root, in a container "
        f"that may make control groups, or where systemd-run works"
    )


@contextmanager
def cgroup_v2(nbytes: int) -> Iterator[Cap]:
    """A group below this process's own; the group must be allowed to hand the memory controller on."""
    own = _own_cgroup("0", "")
    root = next((path for path in (CGROUPS, CGROUPS / "unified") if (path / "cgroup.controllers").exists()), None)
    if root is None or "memory" not in (root / "cgroup.controllers").read_text().split():
        raise CapError("the unified hierarchy has no memory controller")
    with _group(root / own) as group:
        if not (group / "memory.max").exists():
            raise CapError(f"{group.parent} does not hand the memory controller on")
        _write(group / "memory.max", nbytes)
        if (group / "memory.swap.max").exists():
            _write(group / "memory.swap.max", 0)
        yield Cap("cgroup v2", nbytes, join=_joining(group), peak=lambda: _read(group / "memory.peak"))


@contextmanager
def cgroup_v1(nbytes: int) -> Iterator[Cap]:
    """A group below this process's own in the memory hierarchy."""
    root = CGROUPS / "memory"
    with _group(root / _own_cgroup(None, "memory")) as group:
        _write(group / "memory.limit_in_bytes", nbytes)
        if (group / "memory.memsw.limit_in_bytes").exists():
            _write(group / "memory.memsw.limit_in_bytes", nbytes)
        yield Cap("cgroup v1", nbytes, join=_joining(group), peak=lambda: _read(group / "memory.max_usage_in_bytes"))


@contextmanager
def systemd_scope(nbytes: int) -> Iterator[Cap]:
    """A scope of systemd, the user's own for whoever is not root."""
    program = shutil.which("systemd-run")
    if program is None:
        raise CapError("systemd-run is not installed")
    user = () if os.geteuid() == 0 else ("--user",)
    limits = ("-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0")
    prefix = (program, *user, "--scope", "--quiet", "--collect", *limits, "--")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        raise CapError(tried.stderr.strip() or f"systemd-run ends with {tried.returncode}")
    yield Cap("systemd-run", nbytes, prefix=prefix)


@contextmanager
def balloon(nbytes: int) -> Iterator[Cap]:
    """Lock up the rest of the RAM."""
    available = psutil.virtual_memory().available
    if available <= nbytes:
        raise CapError(f"only {available:,} bytes are available, which is less than the cap already")
    with inflated(available - nbytes):
        yield Cap("balloon", nbytes)


@contextmanager
def inflated(nbytes: int) -> Iterator[int]:
    """The id of a process that holds so many bytes of RAM and cannot be made to give them up."""
    command = [sys.executable, str(Path(__file__).with_name("balloon.py")), str(nbytes)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != "held\n":
            _, why = holder.communicate()
            raise CapError(f"cannot lock {nbytes:,} bytes: {why.strip().splitlines()[-1] if why.strip() else 'killed'}")
        yield holder.pid
    finally:
        holder.communicate()  # closes its stdin, at which it leaves


WAYS = (cgroup_v2, cgroup_v1, systemd_scope, balloon)


def _own_cgroup(number: str | None, controller: str) -> str:
    """This process's group in one hierarchy, relative to its root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        found, controllers, path = line.split(":", 2)
        if found == number or (number is None and controller in controllers.split(",")):
            return path.lstrip("/")
    raise CapError("this process is in no such group")


@contextmanager
def _group(parent: Path) -> Iterator[Path]:
    group = parent / f"moe-offload-cap-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A group can be removed once the last of its processes has been reaped, which may take a moment."""
    for _ in range(50):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    group.rmdir()


def _joining(group: Path) -> Callable[[], None]:
    return lambda: _write(group / "cgroup.procs", os.getpid())


def _write(path: Path, value: int) -> None:
    path.write_text(str(value))


def _read(path: Path) -> int | None:
    return int(path.read_text()) if path.exists() else None
