"""How much memory the control groups of this process leave it. Only reads Linux' files, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")

MEMBERSHIP = Path("/proc/self/cgroup")


class _Version(NamedTuple):
    """What the files of a hierarchy are called."""

    folder: str
    limit: str
    used: str
    droppable: str
    """The line of `memory.stat` with the page cache that was not used lately, by all groups below."""


# Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux 6.1.
_V1 = _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("", "memory.max", "memory.current", "inactive_file")
_V2_BESIDE_V1 = _V2._replace(folder="unified")


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Bytes that this process may still take, page cache that can be dropped counted as free; infinity without a limit.

    The tightest group counts, of this process's own and of those around it.
    """
    return min(
        (_left(group, version) for group, version in _groups(root, membership)),
        default=float("inf"),
    )


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, _Version]]:
    """This process's groups, and all groups around them that are visible: a container may see itself as the root."""
    own = _own_groups(membership)
    for version, path in ((_V1, own.get("memory")), (_V2, own.get("")), (_V2_BESIDE_V1, own.get(""))):
        top = root / version.folder
        yield top, version
        inside = Path((path or "/").lstrip("/"))
        for group in (inside, *inside.parents):
            if group.parts and ".." not in group.parts:
                yield top / group, version


def _own_groups(membership: Path) -> dict[str, str]:
    """The path of this process's group by controller; that of version 2 has no controller's name (man 7 cgroups)."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return {}
    return {name: fields[2] for fields in lines if len(fields) == 3 for name in fields[1].split(",")}


def _left(group: Path, version: _Version) -> float:
    """Bytes that one group leaves; infinity if it has no limit, or no files that tell one."""
    try:
        limit = (group / version.limit).read_text().strip()
        used = int((group / version.used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        droppable = int(stat.get(version.droppable, 0))
    except (OSError, ValueError):
        return float("inf")
    if not limit.isdigit():  # "max"
        return float("inf")
    return max(0, int(limit) - used + droppable)
