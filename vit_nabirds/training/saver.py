"""When a training is saved, and what is never saved."""

import time

from vit_nabirds.errors import UserError
from vit_nabirds.parallel.watchdog import Watchdog, bytes_written
from vit_nabirds.runs.checkpoints import Checkpoints, digest
from vit_nabirds.training.reporter import DIVERGED
from vit_nabirds.training.run import Run
from vit_nabirds.training.state import TrainState

WRITTEN = "a checkpoint to be written"


class Saver:
    """Saves states as checkpoints of a run."""

    def __init__(self, run: Run, checkpoints: Checkpoints, watchdog: Watchdog, is_writer: bool) -> None:
        self._watchdog = watchdog
        self._metadata, self._saved, self._checkpoints = run.metadata, run.saved, checkpoints
        self._seconds = run.plan.save_seconds if is_writer else None  # one clock for all processes
        self._saved_at = time.monotonic()

    def is_overdue(self) -> bool:
        """Whether the period of a configuration in minutes has passed."""
        return self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds

    def save(self, step: int, state: TrainState) -> None:
        """Copy the state off the devices; it is written in the background. UserError if it is not finite."""
        parts = state.parts(self._saved)
        digests = digest(parts)
        if not all(found.is_finite for found in digests["params"].values()):
            raise UserError(f"the parameters after step {step} are not finite: {DIVERGED}")
        with self._watchdog.waits_for(WRITTEN, progress=bytes_written):  # the save before this one
            self._checkpoints.save(step, parts, digests, self._metadata)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Until the last save is complete."""
        with self._watchdog.waits_for(WRITTEN, progress=bytes_written):
            self._checkpoints.wait()
