"""When a training is saved, what is never saved, and what becomes of a save that fails."""

import logging
import time

from vit_nabirds.errors import TransientError, UserError, exit_code_of, reason_of
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.watchdog import Watchdog, bytes_written
from vit_nabirds.runs.checkpoints import Checkpoints, digest
from vit_nabirds.training.reporter import DIVERGED
from vit_nabirds.training.run import Run
from vit_nabirds.training.state import TrainState

log = logging.getLogger("vit_nabirds")

WRITTEN = "a checkpoint to be written"
AGAIN = 60.0  # seconds until a save that has failed is tried again
LAST_TRIES = (5.0, 20.0)  # seconds before each that the last state is given; a request to stop leaves few


class Saver:
    """Saves states as checkpoints of a run.

    Alone, a process whose storage is full or does not answer trains on and tries again. Of several, one that cannot
    write ends the job: the others would wait for its part of the checkpoint.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, watchdog: Watchdog, group: ProcessGroup) -> None:
        self._watchdog, self._is_alone = watchdog, group.num_processes == 1
        self._metadata, self._saved, self._checkpoints = run.metadata, run.saved, checkpoints
        self._seconds = run.plan.save_seconds if group.is_writer else None  # one clock for all processes
        self._saved_at, self._again_at, self._last = time.monotonic(), None, None

    def is_overdue(self) -> bool:
        """Whether the period of a configuration in minutes has passed, or a save that failed should be tried again."""
        if self._is_alone and self._checkpoints.has_failed:
            self._wait()
        now = time.monotonic()
        return (
            self._seconds is not None
            and now - self._saved_at >= self._seconds
            or self._again_at is not None
            and now >= self._again_at
        )

    def save(self, step: int, state: TrainState) -> None:
        """Copy the state off the devices; it is written in the background. UserError if it is not finite."""
        parts = state.parts(self._saved)
        digests = digest(parts)
        if not all(found.is_finite for found in digests["params"].values()):
            raise UserError(f"the parameters after step {step} are not finite: {DIVERGED}")
        self._wait()
        self._last = step, parts, digests
        self._try_to_save()
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Wait until the last state is saved; TransientError if that is not possible."""
        for pause in LAST_TRIES:
            self._wait()
            if self._again_at is None:
                return
            time.sleep(pause)
            self._try_to_save()
        self._wait()
        if self._again_at is not None:
            raise TransientError(
                f"step {self._last[0]}, the last, could not be saved: make room, or put the storage right, and run the "
                "same command again to go on from the last checkpoint."
            )

    def _try_to_save(self) -> None:
        step, parts, digests = self._last
        self._again_at = None
        try:
            self._checkpoints.save(step, parts, digests, self._metadata)
        except Exception as error:  # noqa: BLE001
            self._put_off(error)

    def _wait(self) -> None:
        """For the save under way."""
        try:
            with self._watchdog.waits_for(WRITTEN, progress=bytes_written):
                self._checkpoints.wait()
        except Exception as error:  # noqa: BLE001
            self._put_off(error)

    def _put_off(self, error: Exception) -> None:
        """Raise the error again, unless it may be gone later."""
        if not self._is_alone or exit_code_of(error) != TransientError.exit_code:
            raise error
        self._again_at = time.monotonic() + AGAIN
        step, *_ = self._last
        log.warning("the checkpoint of step %d could not be written (%s); the run tries again", step, reason_of(error))
