"""What goes wrong in one process is reported once, clearly and soon, and ends all; a job out of time goes on."""

import os
import re
import shutil
import signal
import sys
import time

import pytest
from real_slurm import REPOSITORY, TINY, wait_until

PYTHON_MAIN = f"{sys.executable} {REPOSITORY / 'main.py'} train {TINY} --start_timeout=10"
ON_RANK_1 = "[ $SLURM_PROCID = 1 ] &&"


@pytest.fixture(scope="module", autouse=True)
def job_with_a_minute(slurm, prepared, tmp_path_factory):
    """20,000 steps, more than any machine does in a minute; started before the tests, which mostly wait."""
    folder = tmp_path_factory.mktemp("minute")
    return slurm.submit(
        "launch/train.sbatch", "--nodes=2", "--cpus-per-task=1", f"--output={folder / 'log'}", "--time=1",
        "--signal=TERM@30", "--", TINY, f"--config.data.root={prepared}", f"--workdir={folder / 'run'}",
        "--config.epochs=4000", "--config.checkpoint.every=50 steps",
    )  # fmt: skip


def start(slurm, prepared, workdir, script, nodes=2):
    """Two tasks that run a script in which $TRAIN starts the training; its messages, without those of srun."""
    training = f"{PYTHON_MAIN} --config.data.root={prepared} --workdir={workdir}"
    began = time.monotonic()
    run = slurm.srun(nodes, 2, "bash", "-c", script.replace("$TRAIN", training))
    assert time.monotonic() - began < 60
    stderr = re.sub(r"127\.0\.0\.[1-4]", "NODE", run.stderr)
    lines = [line for line in stderr.splitlines() if not line.startswith(("srun: ", "[Gloo]"))]
    return run.returncode, lines


@pytest.mark.parametrize(
    "script, message, expected",
    [
        ("$TRAIN --config.seed=$SLURM_PROCID", "process 1 of 2 on NODE: the configuration differs from that of "
         "process 0: config.seed is 1 here and 0 there.", 1),
        (f"{ON_RANK_1} export PYTHONPATH=$PWD/other; $TRAIN", "process 1 of 2 on NODE: the environment differs "
         "from that of process 0: optax is '0.0.1' here and ", 1),
        (f"{ON_RANK_1} exit 1; $TRAIN", "process 1 of 2 did not reach process 0 on NODE, port ", 74),
        ("[ $SLURM_PROCID = 0 ] && exit 1; $TRAIN", "NODE got no answer from process 0 at NODE:", 74),
        (f"{ON_RANK_1} NAME=--coordinator=node-of-nowhere.invalid:6000; $TRAIN $NAME", "NODE cannot resolve "
         "'node-of-nowhere.invalid', the host of process 0: give an address that all nodes can reach with "
         "--coordinator=ADDRESS:PORT.", 74),
        (f"{ON_RANK_1} DATA=--config.data.root=$PWD/copy; $TRAIN $DATA", "process 1 of 2 on NODE: ", 1),
        ("$TRAIN --config.batch_size=9", "config.batch_size is 9, which 2 devices cannot share equally", 2),
    ],
    ids=["configuration", "package", "death in start-up", "no coordinator", "no such host", "data", "batch"],
)  # fmt: skip
def test_a_mistake_is_one_message(slurm, prepared, tmp_path, monkeypatch, script, message, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other" / "optax-0.0.1.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "optax-0.0.1.dist-info" / "METADATA").write_text("Name: optax\nVersion: 0.0.1\n")
    code, lines = start(slurm, prepared, tmp_path / "run", script)
    assert code == expected, lines
    errors = [line for line in lines if line.startswith("error: ")]
    assert message in errors[0], lines
    assert len(lines) == len(errors) <= 2, lines  # process 0 may add that one is missing
    assert not (tmp_path / "run").exists()


def test_a_job_out_of_time_is_queued_again_and_goes_on(slurm, job_with_a_minute):
    """Slurm signals it half a minute before its limit of one."""
    job = job_with_a_minute
    wait_until(lambda: re.search(r"steps [1-9]\d* to 20000 ", job.log()), 240, job.log)
    assert int(job["Restarts"]) > 0
    stopped = re.findall(r"stopped at step (\d+) of .* s after the signal", job.log())
    assert stopped, job.log()  # more than once, where the tests before this one took long
    assert f"steps {stopped[0]} to 20000 " in job.log()
    slurm.run("scancel", job.number)
    assert job.wait(30) == "CANCELLED"


def test_a_workdir_that_is_not_shared(slurm, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    code, lines = start(slurm, prepared, "run", f"{ON_RANK_1} cd elsewhere; $TRAIN")
    assert code == 1 and len(lines) == 1 and "run is not the same folder on all nodes" in lines[0]


def test_a_checkpoint_that_cannot_be_written(slurm, prepared, tmp_path):
    """A limit on the size of files stands in for a full disk: Orbax's threads fail, on one process before the other."""
    # More than TensorBoard's pictures and less than a checkpoint; in KB.
    script = "ulimit -f 64; $TRAIN --config.checkpoint.every='1 steps' --config.model.hidden_size=64"
    code, lines = start(slurm, prepared, tmp_path / "run", script)
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "File too large: make room" in errors[0], lines
    assert "Traceback" not in "".join(lines)


def test_a_wrong_flag_is_reported_once(slurm, prepared, tmp_path):
    code, lines = start(slurm, prepared, tmp_path / "run", "$TRAIN --config.optimiser=adamw")
    assert code == 2 and len(lines) == 1 and "did you mean --config.optimizer." in lines[0]


def training_on(slurm, birds, workdir, log, moment="step 5/"):
    """A job on two nodes that has come to step 5 of 20,000, or an earlier moment."""
    job = slurm.submit(
        "launch/train.sbatch", "--nodes=2", "--cpus-per-task=1", f"--output={log}", "--",
        TINY, f"--config.data.root={birds}", f"--workdir={workdir}", "--config.epochs=4000",
    )  # fmt: skip
    wait_until(lambda: moment in job.log(), 60, job.log)
    return job


def damage_images(_job, birds):
    for image in birds.glob("cleaned_images/*/*"):
        image.write_bytes(b"no image")


def kill(rank):
    return lambda job, _birds: os.kill(job.processes()[rank], signal.SIGKILL)


KILLED = "error: process 1 of 2 on 127.0.0.[1-4] ended without a word: killed, or out of memory."


@pytest.mark.parametrize(
    "moment, happens, message, code",
    [
        ("of 2 process(es)", kill(1), KILLED, "137:0"),  # before the compilation
        ("step 5/", kill(1), KILLED, "137:0"),
        ("step 5/", kill(0), KILLED.replace("process 1", "process 0"), "137:0"),
        ("step 5/", damage_images, "cannot be read ", "1:0"),
    ],
    ids=["killed in start-up", "killed", "first killed", "damaged images"],
)
def test_the_end_of_one_process_ends_all_with_one_message(
    slurm, prepared, tmp_path, monkeypatch, moment, happens, message, code
):
    monkeypatch.setitem(slurm.environment, "MAX_FRUITLESS", "0")
    shutil.copytree(prepared, tmp_path / "birds")
    job = training_on(slurm, tmp_path / "birds", tmp_path / "run", tmp_path / "log", moment)
    happens(job, tmp_path / "birds")
    assert job.wait(45) == "FAILED" and job["ExitCode"] == code and job["Restarts"] == "0"
    messages = [line for line in job.log().splitlines() if line.startswith("error: ")]
    assert re.search(message, messages[0]), job.log()[-3000:]
    assert ["not requeued" in line for line in messages[1:]] == ([True] if code == "137:0" else [])
    assert "Traceback" not in job.log()


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, prepared, tmp_path):
    job = training_on(slurm, prepared, tmp_path / "run", tmp_path / "log")
    slurm.run("scancel", job.number)
    assert job.wait(30) == "CANCELLED" and job["Restarts"] == "0"
    assert "s after the signal" in job.log() and "requeueing" not in job.log()
