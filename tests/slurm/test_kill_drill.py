"""A job that is hit again and again restarts by itself, and trains as if nothing had happened.

The long form, of 50 hits:  HITS=50 python -m pytest tests/slurm/test_kill_drill.py
"""

import os
import random
import signal
import time

import pytest
from real_slurm import EVERYTHING, TINY, Job, last_step, wait_until

from vit_nabirds.runs.metrics import read_metrics

HITS = int(os.environ.get("HITS", 12))


def submit(slurm, prepared, workdir, log, config, tasks, epochs) -> Job:
    training = [*config, f"--config.data.root={prepared}", f"--workdir={workdir}", f"--config.epochs={epochs}"]
    training += ["--config.checkpoint.every=5 steps", "--config.evaluate.every=40 steps"]
    training += ["--config.watchdog_timeout=0.3 minutes"]
    layout = ["--nodes=2", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", f"--output={log}"]
    return slurm.submit("launch/train.sbatch", *layout, "--", *training)


def preempt(slurm, job):
    slurm.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def kill(ranks, number=signal.SIGKILL):
    def hit(slurm, job):
        for process in job.processes()[ranks]:
            os.kill(process, number)

    return hit


WAYS = {
    "SIGTERM": lambda slurm, job: slurm.run("scancel", "--signal=TERM", job.number),
    "preemption": preempt,
    "requeue": lambda slurm, job: slurm.run("scontrol", "requeue", job.number),
    "SIGKILL of the first rank": kill(slice(0, 1)),
    "SIGKILL of the last rank": kill(slice(1, 2)),
    "SIGKILL of all ranks": kill(slice(None)),
    "SIGSTOP of the last rank": kill(slice(1, 2), signal.SIGSTOP),
}


@pytest.mark.parametrize("parts, tasks, hits", [("few", 1, HITS), ("all", 2, HITS // 3)])
def test_a_job_that_is_hit_again_and_again_trains_as_one_that_is_not(
    slurm, prepared, hf_folder, tmp_path, monkeypatch, parts, tasks, hits
):
    """With all parts of the recipe, LoRA among them, on four processes of which two share a copy of the parameters."""
    low_rank = [EVERYTHING, f"--config.model.pretrained={hf_folder}", "--config.lora.rank=2", "--config.batch_size=16"]
    config, epoch = {"few": ([TINY, "--config.model.num_layers=1"], 5), "all": (low_rank, 2.5)}[parts]
    monkeypatch.setitem(slurm.environment, "MAX_FRUITLESS", str(hits))  # some hits come before the first step
    undisturbed, workdir, steps = tmp_path / "undisturbed", tmp_path / "run", 20 * hits
    job = submit(slurm, prepared, undisturbed, tmp_path / "undisturbed.log", config, tasks, steps / epoch)
    assert job.wait(300) == "COMPLETED", job.log()

    draw = random.Random(0)
    ways = [way for _ in range(hits) for way in draw.sample(list(WAYS), len(WAYS))][:hits]
    job = submit(slurm, prepared, workdir, tmp_path / "log", config, tasks, steps / epoch)
    for number, way in enumerate(ways):
        wait_until(lambda: job["JobState"] == "RUNNING" and job.processes(), 150, job.log)
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 8))  # at start-up or in compilation
        else:
            target = last_step(workdir) + draw.randint(1, 20)
            wait_until(lambda: last_step(workdir) >= target, 150, job.log)  # noqa: B023
        restarts, began = int(job["Restarts"]), time.monotonic()
        print(f"hit {number + 1}: {way} after step {last_step(workdir)}", end="", flush=True)
        WAYS[way](slurm, job)
        wait_until(lambda: int(job["Restarts"]) > restarts, 150, job.log)  # noqa: B023
        print(f", queued again in {time.monotonic() - began:.1f} s", flush=True)
    assert last_step(workdir) < steps  # all hits have hit
    assert job.wait(300) == "COMPLETED", job.log()

    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, undisturbed))
    assert [line["step"] for line in ours if "train/loss" in line] == list(range(1, steps + 1))
    clocks = ("time", "train/images_per_second", "train/input_wait", "train/memory_gib")
    timeless = [[{k: v for k, v in line.items() if k not in clocks} for line in lines] for lines in (ours, theirs)]
    assert timeless[0] == timeless[1]  # bit for bit: losses, gradient norms, records, evaluations
    assert (workdir / "results.json").read_text() == (undisturbed / "results.json").read_text()
