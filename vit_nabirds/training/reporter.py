"""What a training reports about its steps."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator

import jax

from vit_nabirds.errors import UserError
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training.run import Run

METRICS = ("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm")
DIVERGED = (
    "lower config.optimizer.learning_rate, lengthen config.optimizer.warmup or set config.optimizer.clip_norm=1, and "
    "start in a new --workdir."
)


class Reporter:
    """Reports each step one step late, when its metrics have been computed; a loss that is not finite ends the run."""

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self._plan, self._batch_size, self._tracker = run.plan, run.config.batch_size, tracker
        self._unreported = collections.deque()
        self.restart(run.start)

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take a step's metrics, and report the steps before it."""
        self._unreported.append((step, metrics))
        self._report(keep=1)

    def flush(self) -> None:
        """Report all steps; waits for the devices."""
        self._report(keep=0)

    def restart(self, step: int) -> None:
        """Measure the speed from now on, at the end of `step`."""
        self._since, self._started, self._waited = step, time.monotonic(), 0.0

    def _report(self, keep: int) -> None:
        while len(self._unreported) > keep:
            step, metrics = self._unreported.popleft()
            if not math.isfinite(loss := float(metrics["train/loss"])):
                raise UserError(f"the loss of step {step} is {loss}: {DIVERGED}")
            if self._plan.logs(step):
                values = {name: float(metrics[name]) for name in METRICS} | self._speed(step)
                self._tracker.scalars(step, values, records=int(metrics["records"]))
            self._tracker.progress(step)

    def _speed(self, step: int) -> dict[str, float]:
        """Images per second, and the share of the time that the host waited for input, since the last report."""
        if step <= self._since:
            return {}
        seconds = time.monotonic() - self._started
        images = (step - self._since) * self._batch_size
        values = {"train/images_per_second": images / seconds, "train/input_wait": self._waited / seconds}
        self.restart(step)
        return values
