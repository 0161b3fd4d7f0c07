"""The cores that belong to a process."""

import os

import pytest

from vit_nabirds.parallel.cpus import cpu_share


@pytest.fixture(autouse=True)
def eight_bound_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize("slurm, cores", [("", 8), ("0", 8), ("2(x3)", 8), ("3", 3), ("16", 8)])
def test_the_smaller_of_slurms_count_and_the_affinity_mask(slurm, cores, tmp_path):
    assert cpu_share({"SLURM_CPUS_PER_TASK": slurm}, tmp_path) == cores
    assert 1 <= cpu_share() <= 8


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/job/task", {"job/task/cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, 3),
        ("0::/job", {"job/cpu.max": "50000 100000", "cpu.max": "400000 100000"}, 1),
        ("0::/", {"cpu.max": "400000 100000"}, 4),  # in a container
        ("0::/gone", {}, 8),
        ("0::/job", {"job/cpu.max": "damaged"}, 8),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "200000", "cpu/job/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/job", {"job/cpu.max": "100000 100000"}, 8),
    ],
)
def test_no_more_than_the_quota_of_its_control_groups(groups, files, cores, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert cpu_share({"SLURM_CPUS_PER_TASK": "20"}, tmp_path) == cores
