"""The CPU cores that belong to this process."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


def cpu_share(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: the smallest of Slurm's share of the task, the affinity mask and the
    quota of its control groups. A node's core count would start one job's workers on its neighbours' cores."""
    shares = [_affinity(), *_quotas(root)]
    slurm = environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdecimal() and int(slurm) > 0:
        shares.append(int(slurm))
    return min(shares)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[int]:
    """Cores that the control groups of this process and those above them leave it, rounded up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # '0::/system.slice/job' of version 2, '4:cpu,cpuacct:/slurm/job' of version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _quota(folder)
            if folder == mounted:
                break


def _quota(group: Path) -> Iterator[int]:
    """Its cores, of '150000 100000' microseconds two; none without a limit, 'max' or -1."""
    try:
        if (file := group / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota != "max" and int(quota) > 0:
            yield max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return
