"""Processes that prepare at the same time and use the GPU one at a time; while one measures, the others are stopped.

A job prints `answer {"asks": "the GPU"}` when it is ready for it, `answer {"asks": "quiet"}` before it measures, and
waits for a line on stdin each time; then it prints `answer` and the result. It has the GPU until its process has ended.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

from benchmarks.contest import ENDED, ROOT

# JAX would take three quarters of the card's memory at once, also while it only waits. Without that it would still stop
# at three quarters, where torch goes on.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": "0.95"}


@functools.cache  # what is asked for again is there already
def ask(for_what: str) -> None:
    """In a job: returns when it may go on."""
    print("answer", json.dumps({"asks": for_what}), flush=True)
    if not sys.stdin.readline():
        sys.exit("error: nobody answers")


def take_turns(
    jobs: dict[str, list[str]], at_once: int, deadline: float, report: Callable[[str, dict], None]
) -> dict[str, dict]:
    """{name: result} of these commands. Of those that are ready for the GPU, the first in `jobs` gets it.

    At the deadline, by time.monotonic(), all that run are killed.
    """
    left, running, asking, results, events = list(jobs), {}, [], {}, queue.Queue()
    holder = None  # of the GPU
    try:
        while left or running:
            while left and len(running) < at_once:
                name = left.pop(0)
                running[name] = _started(name, jobs[name], events)
            try:
                name, answer = events.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if "ended" in answer:
                report(name, results.setdefault(name, {"skipped": f"{ENDED} {answer['ended']}"}))
                del running[name]
                asking = [other for other in asking if other != name]
                holder = None if holder == name else holder
                _signal(running.values(), signal.SIGCONT)
            elif answer.get("asks") == "quiet":
                _signal([process for other, process in running.items() if other != name], signal.SIGSTOP)
                _answer(running[name])
            elif "asks" in answer:
                asking.append(name)
            else:
                results[name] = answer
            if holder is None and asking:
                holder = min(asking, key=list(jobs).index)
                asking.remove(holder)
                _answer(running[holder])
    finally:
        _signal(running.values(), signal.SIGKILL)
    return {name: results.get(name, {"skipped": "skipped (out of time)"}) for name in jobs}


def _started(name: str, command: list[str], events: queue.Queue) -> subprocess.Popen:
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        process_group=0,  # to stop it together with all that it has started
    )  # fmt: skip

    def listen() -> None:
        for line in process.stdout:
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                events.put((name, answer))
                if "asks" not in answer:  # a compiler's process that outlives it may keep stdout open
                    break
        events.put((name, {"ended": process.wait()}))

    threading.Thread(target=listen, daemon=True).start()
    return process


def _answer(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, which is an event of its own
        process.stdin.write("\n")
        process.stdin.flush()


def _signal(processes: Iterable[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
