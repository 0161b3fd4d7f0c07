"""Requests to stop: SIGTERM, SIGUSR1 or SIGUSR2 from the cluster, Ctrl-C from the user."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Self

from vit_nabirds.errors import say

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with everything saved; the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """While entered, a signal out of `signals` sets `requested`, and the work ends at the next safe point. Others of
    SIGNALS are ignored.

    A second signal, more than a second later (srun and the terminal may send the first one twice), kills the process at
    once; the last complete checkpoint stays. `speaks`: this process answers the user, at once, with a line. Outside the
    main thread, where Python takes no signals, nothing is requested.
    """

    def __init__(self, speaks: bool = True, signals: Collection[signal.Signals] = SIGNALS) -> None:
        self._signals = signals
        self.requested = False
        self.since = 0.0
        self._busy_with = ""
        self._speaks = speaks

    def __enter__(self) -> Self:
        self._hearing = _hearing(self._heard, self._request, self._signals)
        self._hearing.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hearing.__exit__(None, None, None)

    @contextlib.contextmanager
    def waits_for(self, work: str) -> Iterator[None]:
        """Around work that cannot be interrupted: the answer to a signal names it."""
        self._busy_with = work
        yield
        self._busy_with = ""

    def _heard(self) -> None:
        if self.requested and time.monotonic() - self.since > 1:
            say("stopped at once: the same command goes on from the last complete checkpoint")
            for worker in multiprocessing.active_children():
                worker.kill()
            os.kill(os.getpid(), signal.SIGKILL)  # no exit code: Slurm takes such a job back into the queue
        self._request()

    def _request(self, *_: object) -> None:
        if not self.requested:
            self.since = time.monotonic()
            self.requested = True
            if self._speaks:
                when = f"after {self._busy_with}" if self._busy_with else "at the next safe point"
                say(f"stopping {when}; a second signal stops at once")


@contextlib.contextmanager
def ends_at_once(clean_up: Callable[[], object]) -> Iterator[None]:
    """While entered, each of SIGNALS cleans up and ends the process, also in the middle of a compilation.

    For work that leaves nothing behind. Outside the main thread, where Python takes no signals, nothing changes.
    """

    def end(*_: object) -> None:
        clean_up()
        say("stopped")
        os._exit(EXIT_STOPPED)

    with _hearing(end, end):
        yield


@contextlib.contextmanager
def _hearing(
    heard: Callable[[], None], handler: Callable[..., None], signals: Collection[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """While entered, these signals call `heard` in a thread that reads them from a pipe; others of SIGNALS are ignored.

    The main thread may be deep in a compilation or a collective. The handler is for signals that an event loop of a
    library takes from the pipe meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while number := os.read(read, 1):
            if number[0] in signals:
                heard()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    previous_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    previous = {n: signal.signal(n, handler if n in signals else signal.SIG_IGN) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_pipe)
        os.close(write)
        thread.join()
        os.close(read)
