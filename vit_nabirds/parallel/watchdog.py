"""Ends a job that hangs, and says which process waits for what.

Nothing fails when a process is stopped, a read never returns or a collective never completes: without this, a job would
stand still until its time is up.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from vit_nabirds.parallel.group import ProcessGroup

KILLED = 128 + 9  # the exit code of a process that was killed: launch/ queues such a job again
TICK = 1.0  # seconds
HURRY = 5.0  # seconds that a request to stop leaves the input
ANSWERING = 15.0  # seconds in which a process that runs answers the others, of longer timeouts
OTHERS = "the devices, or the other processes"


@dataclasses.dataclass
class _Wait:
    what: str
    remedy: Callable[[], object] | None = None
    progress: Callable[[], object] = lambda: None


class Watchdog:
    """A thread beside the main one, while entered.

    It counts the time since the main thread has last waited for something else, and of it only that in which this
    process runs: a job may be suspended. It does not count while XLA compiles, nor before the first such wait.
    """

    def __init__(self, timeout: float, group: ProcessGroup, stopping: Callable[[], bool] = lambda: False) -> None:
        """`timeout` in seconds; 0: never. While `stopping()`, input that hangs is put right at once."""
        self._answering = min(ANSWERING, timeout / 4)
        self._timeout, self._group, self._stopping = timeout, group, stopping
        self._idle, self._wait, self._has_begun, self._has_hurried = 0.0, _Wait(OTHERS), False, False
        self._main, self._closed = threading.get_ident(), threading.Event()

    def __enter__(self) -> Self:
        if self._timeout:
            self._group.state = self._state
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._group.state = lambda: {"waits_for": OTHERS, "seconds": self._timeout}  # for others that still watch

    @contextlib.contextmanager
    def waits_for(
        self, what: str, remedy: Callable[[], object] | None = None, progress: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Around work of the main thread that may hang. `remedy` is called once, after a quarter of the time; the wait
        counts from new whenever `progress()` has changed."""
        before, self._wait, self._idle, self._has_begun = self._wait, _Wait(what, remedy, progress), 0.0, True
        try:
            yield
        finally:
            self._wait, self._idle = before, 0.0

    def _state(self) -> dict:
        """For the other processes."""
        return {"waits_for": self._wait.what, "seconds": self._idle}

    def _watch(self) -> None:
        before, seen, unasked, silent = time.monotonic(), None, 0.0, set()
        while not self._closed.wait(TICK):
            now = time.monotonic()
            ran, before = min(now - before, 2 * TICK), now  # less than has passed, where this process was suspended
            wait = self._wait
            if (progress := (wait.what, wait.progress())) != seen or _is_compiling(self._main):
                seen, self._idle = progress, 0.0
            self._idle += ran
            hurries = self._stopping() and not self._has_hurried  # new workers take longer to start
            if wait.remedy and self._idle > (HURRY if hurries else self._timeout / 4):
                remedy, wait.remedy, self._has_hurried = wait.remedy, None, self._has_hurried or hurries
                remedy()
            # Only process 0 judges: if each started to count from new by itself, none would ever see all others stand.
            if self._group.is_writer and self._has_begun and self._idle > self._timeout:
                self._judge()
            unasked += ran
            if unasked > self._timeout / 3:
                unasked, silent = 0.0, self._still_silent(silent)

    def _still_silent(self, before: set[int]) -> set[int]:
        """The processes that do not answer; those that did not the last time either end the job."""
        states = self._group.ask(self._answering)
        silent = {process_id for process_id, state in states.items() if state is None}
        for process_id in sorted(silent & before):
            self._end(process_id, "does not answer: it is stopped, or its node hangs")
        return silent

    def _judge(self) -> None:
        """End the job, unless a process still moves or does not answer (`_still_silent`)."""
        states = {self._group.process_id: self._state()} | self._group.ask(self._answering)
        self._idle = 0.0
        if None in states.values() or any(state["seconds"] < self._timeout / 2 for state in states.values()):
            return
        stuck = [number for number, state in states.items() if state["waits_for"] != OTHERS] or list(states)
        waits = f"has not moved for {self._timeout / 60:.3g} minutes. It waits for {states[stuck[0]]['waits_for']}"
        self._end(stuck[0], waits)

    def _end(self, process_id: int, what: str) -> None:
        name = self._group.name_of(process_id)
        self._group.show_stacks(process_id)
        self._group.end(
            f"{name} {what} (config.watchdog_timeout). The same command goes on from the last checkpoint.", KILLED
        )


def _is_compiling(thread: int) -> bool:
    """Whether the thread of this number is in XLA's compiler, which may take many minutes."""
    frame = sys._current_frames().get(thread)
    while frame and not frame.f_code.co_filename.endswith("jax/_src/compiler.py"):
        frame = frame.f_back
    return frame is not None


def bytes_written() -> int:
    """By this process, up to now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0]) // 2**16
    except (OSError, IndexError, ValueError):
        return 0
