"""Which control groups a process is in, on Linux: they limit its memory and its time on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
"""Where Linux shows the hierarchies of control groups."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""The groups of this process."""


def groups(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[tuple[Path, int]]:
    """This process's groups, and all visible ones around them, each with the version of its hierarchy, 1 or 2.

    A container may see itself as the root. Version 1 has a hierarchy for each controller, such as `"memory"`; that of
    version 2 may be beside them.
    """
    own = _own_groups(membership)
    for version, folder, path in (
        (1, controller, own.get(controller)),
        (2, "", own.get("")),
        (2, "unified", own.get("")),
    ):
        top = root / folder
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
