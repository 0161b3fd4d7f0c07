"""TensorBoard's event file of a run."""

import contextlib
import logging
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

log = logging.getLogger("vit_nabirds")

AGAIN = 60.0  # seconds until another file is begun


class Events:
    """Writes each event at once, in this thread: tensorboardX's own thread would die of a full disk, and its queue then
    holds up the training.

    What cannot be written is left out. TensorBoard drops what earlier files have from `first_step` on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._writer, self._again_at = folder, None, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, *summaries: Summary) -> None:
        self._write(*(Event(step=step, wall_time=time.time(), summary=summary) for summary in summaries))

    def _write(self, *events: Event) -> None:
        if time.monotonic() < self._again_at:
            return
        try:
            self._writer = self._writer or EventsWriter(str(self._folder / "events"))
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self.close()
            self._writer, self._again_at = None, time.monotonic() + AGAIN
            log.warning("%s: events are left out for %.0f s (%s)", self._folder, AGAIN, error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer:
                self._writer.close()
