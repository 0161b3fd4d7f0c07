"""The scripts of launch/ that the other tests do not start, and a node that fails."""

import os
import subprocess

from real_slurm import REPOSITORY, TINY, last_step, wait_until
from tiny_runs import read_evaluations


def test_one_task_for_each_node_on_staged_data(slurm, prepared, tmp_path, monkeypatch):
    archive, disk = tmp_path / f"{prepared.name}.tar", tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["tar", "-cf", archive, "-C", prepared.parent, prepared.name], check=True)
    slow = tmp_path / "bin" / "tar"  # a minute in the first start, which is preempted meanwhile
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/second ] || {{ touch {tmp_path}/second; sleep 60; }}\nexec /bin/tar "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setitem(slurm.environment, "PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(slurm.environment, "STAGE", str(archive))
    monkeypatch.setitem(slurm.environment, "TMPDIR", str(disk))
    job = slurm.submit(
        "launch/train_by_node.sbatch", "--nodes=2", "--cpus-per-task=2", f"--output={tmp_path / 'log'}", "--",
        TINY, "--config.data.root=nowhere", f"--workdir={tmp_path / 'run'}", "--config.epochs=2",
    )  # fmt: skip
    wait_until((tmp_path / "second").exists, 60, job.log)
    slurm.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.wait(120) == "COMPLETED" and job["Restarts"] == "1", job.log()
    assert "of 2 process(es)" in job.log() and job.log().count("is unpacked in") == 1  # the nodes share this disk
    assert (disk / f"vit-nabirds-{os.getuid()}" / prepared.name / "metadata.parquet").exists()


def test_an_array_trains_each_run_of_a_sweep_in_its_own_workdir_whatever_comes(slurm, prepared, tmp_path):
    job = slurm.submit(
        "launch/train.sbatch", "--cpus-per-task=1", "--array=0-2", f"--output={tmp_path / 'log-%a'}", "--",
        "sweep", TINY, f"--config.data.root={prepared}", f"--workdir={tmp_path}", "--config.epochs=20",
        "--set", "optimizer.learning_rate=0.01,0.002",
    )  # fmt: skip
    logs = [tmp_path / f"log-{task}" for task in range(3)]
    for log in logs[:2]:
        wait_until(lambda: log.exists() and "step 5/" in log.read_text(), 60)  # noqa: B023
    slurm.run("scancel", "--signal=TERM", job.number)
    wait_until(lambda: not slurm.run("squeue", "-h", f"--job={job.number}").stdout, 120)
    assert all("requeueing the job to resume from step" in log.read_text() for log in logs[:2])
    assert all("finished: " in log.read_text() for log in logs[:2])
    runs = [tmp_path / f"learning_rate={rate}" for rate in ("0.01", "0.002")]
    results = [read_evaluations(run / "metrics.jsonl") for run in runs]
    assert results[0].keys() == results[1].keys() and results[0] != results[1]
    assert all((run / "restarts.log").exists() for run in runs)
    outside = "error: SLURM_ARRAY_TASK_ID is 2, but the sweep has 2 runs: submit it with --array=0-1."
    assert logs[2].read_text().splitlines() == [outside]


def test_options_replace_those_of_the_script_also_inside_an_allocation(slurm, prepared, tmp_path, monkeypatch):
    allocation = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_MEM_PER_CPU": "9", "SLURM_CPUS_PER_TASK": "3"}
    for name, value in (allocation | {"SRUN_OPTIONS": "--label --kill-on-bad-exit=1"}).items():
        monkeypatch.setitem(slurm.environment, name, value)
    job = slurm.submit(
        "launch/train.sbatch", "--ntasks=2", "--cpus-per-task=1", "--mem=2G", f"--output={tmp_path / 'log'}", "--",
        TINY, f"--config.data.root={prepared}", f"--workdir={tmp_path / 'run'}", "--config.epochs=1",
    )  # fmt: skip
    assert job.wait(120) == "COMPLETED", job.log()
    assert "of 2 process(es)" in job.log() and "\n0: " in job.log()


def test_a_job_goes_on_when_a_node_fails(slurm, prepared, tmp_path):
    job = slurm.submit(
        "launch/train.sbatch", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path / 'log'}", "--",
        TINY, f"--config.data.root={prepared}", f"--workdir={tmp_path / 'run'}", "--config.epochs=16",
        "--config.checkpoint.every=5 steps",
    )  # fmt: skip
    wait_until(lambda: last_step(tmp_path / "run") > 10, 60, job.log)
    failed = slurm.run("scontrol", "show", "hostnames", job["NodeList"]).stdout.split()[1]
    slurm.run("scontrol", "update", f"NodeName={failed}", "State=DOWN", "Reason=test")
    wait_until(lambda: int(job["Restarts"]) == 1, 60, job.log)
    slurm.run("scontrol", "update", f"NodeName={failed}", "State=RESUME")
    assert job.wait(180) == "COMPLETED", job.log()
    assert job.log().count("finished: ") == 1


def test_a_job_is_submitted_only_if_nothing_is_to_be_fixed(slurm, prepared, tmp_path):
    training = ["--", TINY, f"--config.data.root={prepared}", f"--workdir={tmp_path / 'run'}"]

    def submit(*options, more=()):
        layout = ["--nodes=2", "--cpus-per-task=1", f"--output={tmp_path / 'log'}", *options]
        return slurm.run("launch/train.sbatch", "--check", *layout, *training, *more, cwd=REPOSITORY)

    refused = submit("--partition=nowhere", "--time=3", more=["--config.batch_size=9", "--start_timeout=60"])
    assert refused.returncode == 2, refused.stderr
    assert "to fix:\n1. config.batch_size is 9, which 2 devices cannot share equally" in refused.stdout
    assert "2. Slurm would refuse the job: " in refused.stdout and "invalid partition" in refused.stdout
    assert "Submitted" not in refused.stdout and not (tmp_path / "run").exists()

    taken = submit("--partition=high", "--begin=now+1hour")
    assert taken.returncode == 0, taken.stdout + taken.stderr
    assert "slurm        the job would start at " in taken.stdout and "in partition high\n" in taken.stdout
    *_, verdict, submitted = taken.stdout.splitlines()
    assert verdict == "ready" and submitted.startswith("Submitted batch job ")
    assert slurm.run("scancel", submitted.split()[-1]).returncode == 0
