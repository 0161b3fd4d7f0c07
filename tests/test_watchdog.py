"""What hangs is put right, or ends the job with a message; what is slow or suspended does not."""

import os
import re
import signal
import subprocess
import threading
import time

import jax
import pytest
from test_main import held, read_until, wait_until
from tiny_runs import losses

from vit_nabirds.parallel import watchdog
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.watchdog import KILLED, OTHERS, Watchdog, _is_compiling
from vit_nabirds.runs.metrics import read_metrics

LONG = "--config.epochs=20000"


def workers_of(process) -> list[int]:
    """Its worker processes that read photographs."""
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    return list(map(int, found.stdout.split()))


def start(main, workdir, *arguments, workers=1):
    """A training that only saves at its end, after three steps."""
    never = [f"--config.{what}.every=100000 steps" for what in ("evaluate", "checkpoint")]
    command = [*main.tiny, f"--workdir={workdir}", f"--config.data.workers={workers}", *never, *arguments]
    running = main(*command, start_only=True, start_new_session=True)
    wait_until(lambda: len(read_metrics(workdir / "metrics.jsonl")) >= 3, running)
    return running


def test_workers_that_are_stopped_or_killed_are_replaced(main, undisturbed, tmp_path):
    running = start(main, tmp_path / "run", LONG, "--config.watchdog_timeout=0.5 minutes")
    for number in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(workers_of(running)[0], number)
        read_until(running, "a process that reads photographs was killed or hung: new ones go on (1)")
        steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
        wait_until(lambda steps=steps: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > steps + 5, running)
    running.kill()
    found, expected = losses(tmp_path / "run"), losses(undisturbed)
    assert list(found) == list(range(1, len(found) + 1))  # no step twice, none left out
    # The schedules differ, so only the photographs of the first steps can be compared.
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


def test_workers_that_are_always_killed_end_the_run(main, tmp_path):
    running = start(main, tmp_path / "run", LONG)
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.02):
            for worker in workers_of(running):
                os.kill(worker, signal.SIGKILL)

    threading.Thread(target=kill).start()
    output, _ = running.communicate(timeout=120)
    over.set()
    assert running.returncode == 74 and "so were those that replaced them" in output, output
    assert "Traceback" not in output


def test_a_stop_is_saved_while_the_input_hangs(main, tmp_path):
    running = start(main, tmp_path / "run", LONG)
    os.kill(workers_of(running)[0], signal.SIGSTOP)
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 75 and "all saved" in output, output
    stopped = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()


def test_workers_do_not_outlive_a_training_that_is_killed(main, tmp_path):
    running = start(main, tmp_path / "run", LONG)
    workers = workers_of(running)
    running.kill()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert workers and time.monotonic() < deadline
        time.sleep(0.1)


def test_a_process_that_hangs_shows_its_stacks_and_ends_as_if_killed(main):
    running = held(main, "step 3/20", "--config.watchdog_timeout=0.05 minutes")
    output = read_until(running, "The same command goes on")
    assert running.wait(timeout=20) == KILLED, output
    assert "stacks of the threads of the process on" in output and "in hold" in output
    assert "has not moved for 0.05 minutes. It waits for" in output and "watchdog_timeout" in output


def test_a_suspended_job_goes_on(main, tmp_path):
    running = start(main, tmp_path / "run", "--config.epochs=400", "--config.watchdog_timeout=0.05 minutes", workers=0)
    os.killpg(running.pid, signal.SIGSTOP)
    time.sleep(6)
    os.killpg(running.pid, signal.SIGCONT)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0 and "stacks" not in output, output


class Recorder(ProcessGroup):
    """A process alone that does not end."""

    def show_stacks(self, process_id: int) -> None:
        pass

    def end(self, message: str, code: int) -> None:
        self.ended = message


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "TICK", 0.05)


def test_work_that_makes_progress_may_last(quick):
    """As a long evaluation, whose batches come, or a slow save, which writes."""
    group, count = Recorder(), iter(range(10**9))
    with Watchdog(0.3, group) as dog:
        with dog.waits_for("a checkpoint to be written", progress=lambda: next(count)):
            time.sleep(1)
        for _ in range(10):
            with dog.waits_for("photographs"):
                time.sleep(0.1)
        assert not hasattr(group, "ended")
        with dog.waits_for("a checkpoint to be written", progress=lambda: 0):
            time.sleep(1)
    assert "waits for a checkpoint to be written" in group.ended


def test_a_request_to_stop_hurries_the_input_once(quick, monkeypatch):
    """Those that take the place of hurried workers need time to start."""
    monkeypatch.setattr(watchdog, "HURRY", 0.2)
    remedied = []
    with Watchdog(100, Recorder(), lambda: True) as dog:
        for _ in range(2):
            with dog.waits_for("photographs", lambda: remedied.append(True)):
                time.sleep(0.6)
    assert len(remedied) == 1


def test_only_process_0_judges_so_that_all_others_are_seen_to_stand(quick):
    group = Recorder(1, 2)
    with Watchdog(0.3, group) as dog:
        with dog.waits_for("photographs"):
            pass
        time.sleep(1)
        assert group.state()["seconds"] > 0.6
    assert group.state()["seconds"] >= 0.3  # having left, it stands for ever


def test_nothing_counts_before_the_first_wait(quick):
    group = Recorder()
    with Watchdog(0.2, group):
        time.sleep(0.8)
    assert not hasattr(group, "ended")


def test_a_compilation_is_noticed():
    seen, over, thread = [], threading.Event(), threading.get_ident()

    def look() -> None:
        while not over.wait(0.001):
            seen.append(_is_compiling(thread))

    threading.Thread(target=look).start()
    jax.jit(lambda x: [x := jax.numpy.sin(x) @ x for _ in range(30)][-1] + time.time())(jax.numpy.ones((8, 8)))
    over.set()
    assert any(seen) and not _is_compiling(thread)


class Several(Recorder):
    """Process 0 of 3, to whom the others answer as told."""

    def __init__(self, answers: dict) -> None:
        super().__init__(0, 3)
        self._peers = {1: (None, "node1"), 2: (None, "node2")}
        self.answers = answers

    def ask(self, seconds: float) -> dict:
        return self.answers


@pytest.mark.parametrize(
    "answers, message",
    [
        ({1: {"waits_for": OTHERS, "seconds": 9}, 2: {"waits_for": "photographs", "seconds": 9}},
         "process 2 of 3 on node2 has not moved for .* It waits for photographs"),
        ({1: {"waits_for": OTHERS, "seconds": 9}, 2: None},
         "process 2 of 3 on node2 does not answer: it is stopped"),
        ({1: {"waits_for": OTHERS, "seconds": 9}, 2: {"waits_for": OTHERS, "seconds": 9}},
         "process 0 of 3 on .* has not moved for .* It waits for the devices"),
        ({1: {"waits_for": OTHERS, "seconds": 9}, 2: {"waits_for": OTHERS, "seconds": 0}}, None),  # it compiles
    ],
)  # fmt: skip
def test_the_process_that_others_wait_for_is_named(quick, answers, message):
    group = Several(answers)
    with Watchdog(0.3, group) as dog:
        with dog.waits_for("photographs"):
            pass
        time.sleep(1.2)
    assert re.search(message, group.ended) if message else not hasattr(group, "ended")
