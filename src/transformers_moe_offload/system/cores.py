"""How many cores a process may use, under the limits of control groups."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from transformers_moe_offload.system.control_groups import MEMBERSHIP, ROOT, groups

logger = logging.getLogger(__name__)


def granted_cores(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Cores' worth of time that control groups leave this process, such as 0.5; infinity without a limit.

    The tightest group counts, of this process's own and of those around it.
    """
    return min((_granted(group, version) for group, version in groups("cpu", root, membership)), default=math.inf)


def warn_of_idle_threads() -> None:
    """Say so where torch has more threads than control groups leave cores: they wait for each other's time."""
    cores, threads = granted_cores(), torch.get_num_threads()
    useful = max(1, math.ceil(min(cores, threads)))
    if threads > useful:
        logger.warning(
            f"torch uses {threads} threads, but a control group leaves this process {cores:g} cores: threads that wait "
            f"for others use up their time. Set OMP_NUM_THREADS={useful}, or call torch.set_num_threads({useful})"
        )


def _granted(group: Path, version: int) -> float:
    """Cores that one group grants; infinity if it has no limit, or no files that tell one (Documentation/scheduler/
    sched-bwc.rst and admin-guide/cgroup-v2.rst of Linux 6.1)."""
    try:
        if version == 1:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        else:
            quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return math.inf
    if not (quota.isdigit() and period.isdigit() and int(period)):  # "max", or -1
        return math.inf
    return int(quota) / int(period)
