"""The CPU cores that belong to this process."""

import os


def cpu_share() -> int:
    """Cores of this process: Slurm's share of the task, else the affinity mask, else all of the machine."""
    # A node's core count would start one job's workers on its neighbours' cores.
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        return int(slurm)
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
