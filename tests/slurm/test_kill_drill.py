"""A job that is hit again and again restarts by itself, and trains as if nothing had happened.

The long form, of 50 hits:  HITS=50 python -m pytest tests/slurm/test_kill_drill.py
"""

import os
import random
import signal
import time

from real_slurm import TINY, Job, last_step, wait_until

from vit_nabirds.runs.metrics import read_metrics

HITS = int(os.environ.get("HITS", 12))
STEPS = 20 * HITS


def submit(slurm, prepared, workdir, log, *resources) -> Job:
    training = [TINY, f"--config.data.root={prepared}", f"--workdir={workdir}", f"--config.epochs={STEPS // 5}"]
    training += ["--config.checkpoint.every=5 steps", "--config.evaluate.every=40 steps", "--config.model.num_layers=1"]
    layout = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}", *resources]
    return slurm.submit("launch/train.sbatch", *layout, "--", *training)


def preempt(slurm, job):
    slurm.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def kill(ranks):
    def hit(slurm, job):
        for process in job.processes()[ranks]:
            os.kill(process, signal.SIGKILL)

    return hit


WAYS = {
    "SIGTERM": lambda slurm, job: slurm.run("scancel", "--signal=TERM", job.number),
    "preemption": preempt,
    "requeue": lambda slurm, job: slurm.run("scontrol", "requeue", job.number),
    "SIGKILL of the first rank": kill(slice(0, 1)),
    "SIGKILL of the last rank": kill(slice(1, 2)),
    "SIGKILL of all ranks": kill(slice(None)),
}


def test_a_job_that_is_hit_again_and_again_trains_as_one_that_is_not(slurm, prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(slurm.environment, "MAX_FRUITLESS", str(HITS))  # some hits come before the first step
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    assert submit(slurm, prepared, undisturbed, tmp_path / "undisturbed.log").wait(180) == "COMPLETED"

    draw = random.Random(0)
    ways = [way for _ in range(HITS) for way in draw.sample(list(WAYS), len(WAYS))][:HITS]
    job = submit(slurm, prepared, workdir, tmp_path / "log")
    for number, way in enumerate(ways):
        wait_until(lambda: job["JobState"] == "RUNNING" and job.processes(), 90, job.log)
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 8))  # at start-up or in compilation
        else:
            target = last_step(workdir) + draw.randint(1, 20)
            wait_until(lambda: last_step(workdir) >= target, 90, job.log)  # noqa: B023
        restarts, began = int(job["Restarts"]), time.monotonic()
        print(f"hit {number + 1}: {way} after step {last_step(workdir)}", end="", flush=True)
        WAYS[way](slurm, job)
        wait_until(lambda: int(job["Restarts"]) > restarts, 90, job.log)  # noqa: B023
        print(f", queued again in {time.monotonic() - began:.1f} s", flush=True)
    assert last_step(workdir) < STEPS  # all hits have hit
    assert job.wait(300) == "COMPLETED", job.log()

    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, undisturbed))
    assert [line["step"] for line in ours if "train/loss" in line] == list(range(1, STEPS + 1))
    clocks = ("time", "train/images_per_second", "train/input_wait")
    timeless = [[{k: v for k, v in line.items() if k not in clocks} for line in lines] for lines in (ours, theirs)]
    assert timeless[0] == timeless[1]  # bit for bit: losses, gradient norms, records, evaluations
    assert (workdir / "results.json").read_text() == (undisturbed / "results.json").read_text()
