"""The CPU and its memory: how many cores this process may use, and how it keeps memory for its arrays."""

import os
import sys


def cpu_share() -> int:
    """Cores of this process: Slurm's share of the task, else the affinity mask, else all of the machine."""
    # A node's core count would start one job's workers on its neighbours' cores.
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit() and int(slurm) > 0:
        return int(slurm)
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Freed memory stays with the process, in pages of 2 MB.
MALLOC = {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"}


def with_kept_memory() -> None:
    """Start this program again, once, with `MALLOC`, which glibc 2.35 or newer understands.

    XLA takes its working memory anew at each step, and the kernel would clear it each time, page by page: a quarter of
    the time of a step on a CPU.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ.update(MALLOC)
        os.execv(sys.executable, sys.orig_argv)
