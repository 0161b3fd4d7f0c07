"""The same run on any number of nodes and processes."""

import shlex
import subprocess
import sys

import pytest
from real_slurm import EVERYTHING, REPOSITORY, TINY, last_step, wait_until
from tiny_runs import read_evaluations

from vit_nabirds.runs.metrics import read_metrics


def trace(workdir) -> dict[int, tuple[int, float]]:
    """Checksum of the batch and loss by step; no step twice."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
    steps = {line["step"]: (line["records"], line["train/loss"]) for line in lines}
    assert len(steps) == len(lines)
    return steps


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    assert [records for records, _ in ours.values()] == [records for records, _ in theirs.values()]
    assert [loss for _, loss in ours.values()] == pytest.approx([loss for _, loss in theirs.values()], rel=1e-4)


def arguments(prepared, workdir):
    # A rate at which the rounding of one layout or another does not grow into another run.
    return [TINY, f"--config.data.root={prepared}", f"--workdir={workdir}", "--config.epochs=12",
            "--config.evaluate.every=10 steps", "--config.optimizer.learning_rate=0.001"]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(slurm, prepared, tmp_path_factory):
    """60 steps of one process that has two devices."""
    workdir = tmp_path_factory.mktemp("one")
    run = slurm.train(1, 1, *arguments(prepared, workdir), "--config.cpu_devices=2")
    assert run.returncode == 0, run.stderr
    return workdir


@pytest.mark.parametrize("nodes, tasks", [(2, 2), (1, 2)])
def test_two_tasks_train_as_one_process_with_two_devices(slurm, one_process, prepared, tmp_path, nodes, tasks):
    run = slurm.train(nodes, tasks, *arguments(prepared, tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("finished: ") == 1  # one process writes
    assert "2 cpu device(s) of 2 process(es)" in run.stderr
    assert_same(trace(tmp_path), trace(one_process))
    assert read_evaluations(tmp_path / "metrics.jsonl")[60]["val/examples"] == 8


def test_tasks_in_containers_of_their_own_train_as_one(slurm, one_process, prepared, tmp_path):
    """Both have the number 1, the same name of the machine and a /dev/shm of their own."""
    container = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces")
    inside = "hostname localhost && mount -t tmpfs none /dev/shm && exec " + shlex.join(
        map(str, [sys.executable, REPOSITORY / "main.py", "train", *arguments(prepared, tmp_path)])
    )
    run = slurm.srun(2, 2, *container, "bash", "-c", inside)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("finished: ") == 1 and "2 cpu device(s) of 2 process(es)" in run.stderr
    assert_same(trace(tmp_path), trace(one_process))


def test_a_run_moves_from_2x2_to_1x4_4x1_and_1x1_processes_and_devices(slurm, one_process, prepared, tmp_path):
    """Preempted on each layout but the last; the 15 test images divide by none of them."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    for nodes, tasks, devices, preempted in [(2, 1, 2, True), (1, 1, 4, True), (2, 2, 1, True), (1, 1, 1, False)]:
        before = last_step(workdir)
        resources = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", "--no-requeue"]
        training = [*arguments(prepared, workdir), "--config.checkpoint.every=2 steps"]
        training.append(f"--config.cpu_devices={devices}")
        job = slurm.submit("launch/train.sbatch", *resources, f"--output={log}", "--", *training)
        if preempted:
            wait_until(lambda: last_step(workdir) > before + 5, 120, job.log)  # noqa: B023
            slurm.run("scancel", "--signal=TERM", job.number)
        job.wait(120)
    assert job["JobState"] == "COMPLETED", job.log()
    layouts = ["4 cpu device(s) of 2 ", "4 cpu device(s) of 1 ", "4 cpu device(s) of 4 ", "1 cpu device(s) of 1 "]
    assert [job.log().count(layout) for layout in layouts] == [1] * 4
    assert job.log().count("s after the signal") == 3
    assert_same(trace(workdir), trace(one_process))
    evaluations = read_evaluations(workdir / "metrics.jsonl")
    assert [evaluation["val/examples"] for evaluation in evaluations.values()] == [8] * 6


def test_all_parts_of_the_recipe_at_once_go_on_after_a_preemption_and_on_another_layout(slurm, prepared, tmp_path):
    """Four processes, of which two share a copy of the parameters, and each works on two of its four images at once."""

    def start(name, tasks, *flags):
        resources = ["--nodes=2", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", "--no-requeue"]
        training = [EVERYTHING, f"--config.data.root={prepared}", f"--workdir={tmp_path / name}", *flags]
        training += ["--config.batch_size=16", "--config.epochs=16", "--config.optimizer.learning_rate=1e-4",
                     "--config.model.num_layers=1", "--config.evaluate.views=flip"]  # fmt: skip
        return slurm.submit("launch/train.sbatch", *resources, f"--output={tmp_path / name}.log", "--", *training)

    job = start("whole", 2)
    assert job.wait(300) == "COMPLETED", job.log()
    whole = trace(tmp_path / "whole")
    for name, tasks, flags in [("same", 2, []), ("moved", 1, ["--config.mesh.fsdp=1", "--config.cpu_devices=2"])]:
        job = start(name, 2)
        wait_until(lambda: last_step(tmp_path / name) > 10, 300, job.log)  # noqa: B023
        slurm.run("scancel", "--signal=TERM", job.number)
        job.wait(300)
        assert 10 < last_step(tmp_path / name) < 40
        job = start(name, tasks, *flags)
        assert job.wait(300) == "COMPLETED", job.log()
        if name == "same":
            assert trace(tmp_path / name) == whole  # bit for bit
        assert_same(trace(tmp_path / name), whole)
