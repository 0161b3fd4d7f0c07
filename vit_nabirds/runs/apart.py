"""A training in a process of its own, its output in its workdir's train.log."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest

LOG = "train.log"
TAIL = 10_000  # bytes at the end of a log in which its last line is looked for


def train_apart(
    command: list[str], workdir: Path, held: int, spent: Callable[[float], object] | None = None, **options
) -> tuple[int, str]:
    """Start or resume a run and wait for its end. Returns its exit code, and the last line of its log if it has failed.

    A request to stop is passed on, and makes the exit code 75. `held` is the descriptor of a lock, which the run has
    too: it keeps others out if it outlives this process. `spent` is given the seconds, twice a minute and at the end.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    start, told, passed_on = time.monotonic(), 0.0, False
    with (workdir / LOG).open("a+b") as log, StopRequest() as stop:
        process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[held], **options)
        while process.poll() is None:
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass
            if stop.requested and not passed_on:
                process.terminate()
                passed_on = True
            seconds = time.monotonic() - start
            if spent and (seconds - told > 30 or process.returncode is not None):
                spent(seconds)
                told = seconds
        code = EXIT_STOPPED if stop.requested else process.returncode
        return code, _last_line(log) if code not in (0, EXIT_STOPPED) else ""


def _last_line(log: BinaryIO) -> str:
    log.seek(max(0, log.seek(0, 2) - TAIL))
    return (log.read().decode(errors="replace").splitlines() or ["no output"])[-1]
