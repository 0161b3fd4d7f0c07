"""A tracker with a server, which may be slow or gone, beside a training that must not notice."""

import logging
import queue
import threading
from collections.abc import Callable

import numpy as np

from vit_nabirds.errors import without_secrets
from vit_nabirds.runs.trackers import Backend

log = logging.getLogger("vit_nabirds")

AGAIN = 60.0  # seconds until a server that does not answer at the start is asked again
MOST = 10_000  # calls that wait; more are left out
CLOSING = 15.0  # seconds for what waits at the end: a request to stop leaves few


class Background:
    """Makes the calls of a Backend in a thread of its own, which opens it for the first one. What fails is said once,
    and left out."""

    def __init__(self, name: str, opened: Callable[[], Backend]) -> None:
        self._name, self._open, self._backend, self._has_warned = name, opened, None, False
        self._calls, self._closing = queue.Queue(MOST), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._put("scalars", step, values)

    def text(self, name: str, markdown: str) -> None:
        self._put("text", name, markdown)

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        self._put("images", name, step, picture)

    def close(self) -> None:
        """Wait for what waits, but not long."""
        self._put("close")
        self._closing.set()
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            log.warning("%s has not taken all figures in %.0f s: the rest is left out", self._name, CLOSING)

    def _put(self, *call: object) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn("it is too slow for so many figures")

    def _work(self) -> None:
        method, *arguments = self._calls.get()
        while self._backend or method != "close":
            while not self._is_open():
                if self._closing.wait(AGAIN):
                    return
            try:
                getattr(self._backend, method)(*arguments)
            except Exception as error:  # noqa: BLE001, of any library
                self._warn(error)
            if method == "close":
                return
            method, *arguments = self._calls.get()

    def _is_open(self) -> bool:
        try:
            self._backend = self._backend or self._open()
        except Exception as error:  # noqa: BLE001
            self._warn(error)
        return self._backend is not None

    def _warn(self, reason: object) -> None:
        if not self._has_warned:
            self._has_warned = True
            kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
            text = without_secrets(" ".join(str(reason).split()))[:300]
            log.warning("%s does not take all that is reported (%s%s); the training goes on", self._name, kind, text)
