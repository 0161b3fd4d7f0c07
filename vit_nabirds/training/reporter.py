"""What a training reports about its steps."""

import collections
import contextlib
import logging
import time
from collections.abc import Iterator

import jax

from vit_nabirds.data.batches import rows_of_step
from vit_nabirds.errors import UserError
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.gpus import peak_of
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training.run import Run

log = logging.getLogger("vit_nabirds")

METRICS = ("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm")
NAMED = 8  # photographs of a step in the log; metrics.jsonl has all
DIVERGED = (
    "lower config.optimizer.learning_rate or set config.optimizer.clip_norm=1, and start in a new --workdir, or go on "
    "from an earlier checkpoint with --accept_changes --from_step=STEP."
)


class Reporter:
    """Reports each step one step late, when its metrics have been computed.

    Counts the steps that changed nothing, because their loss or gradient was not finite.
    """

    def __init__(self, run: Run, tracker: Tracker) -> None:
        self._run, self._plan, self._batch_size, self._tracker = run, run.plan, run.config.batch_size, tracker
        self._unreported = collections.deque()
        self._bad, self._bad_in_a_row = 0, 0
        self._peak = peak_of(devices.own(run.mesh).device_kind, run.config.compute_dtype)
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

    @property
    def has_diverged(self) -> bool:
        """Whether so many steps in a row changed nothing that the run must end."""
        return self._bad_in_a_row >= self._run.config.max_bad_steps

    def check(self, step: int) -> None:
        """UserError if the run has diverged; `step` is its last, which is saved."""
        if self.has_diverged:
            raise UserError(
                f"the last {self._bad_in_a_row} steps up to {step} changed nothing, because their loss or gradient was "
                f"not finite. The state before them is saved: {DIVERGED}"
            )

    def restart(self, step: int) -> None:
        """Measure the speed from now on, at the end of `step`."""
        self._since, self._started, self._waited = step, time.monotonic(), 0.0

    def _report(self, keep: int) -> None:
        while len(self._unreported) > keep:
            step, metrics = self._unreported.popleft()
            is_finite = bool(metrics["finite"])  # which waits for the step
            self._tracker.progress(step)
            if not is_finite:
                self._report_bad(step, metrics)
            elif self._plan.logs(step):
                values = {name: float(metrics[name]) for name in METRICS} | self._speed(step)
                self._tracker.scalars(step, values, records=int(metrics["records"]))
            if not self.has_diverged:
                self._bad_in_a_row = 0 if is_finite else self._bad_in_a_row + 1

    def _report_bad(self, step: int, metrics: dict[str, jax.Array]) -> None:
        run, self._bad = self._run, self._bad + 1
        data = run.config.data
        rows = rows_of_step(
            run.train_split, self._batch_size, run.config.seed, step - 1, data.sampling, data.repeats
        )  # fmt: skip
        names = run.table[rows[:NAMED]]["path"].to_list()
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        loss, norm = float(metrics["train/loss"]), float(metrics["train/gradient_norm"])
        self._tracker.scalars(step, {"train/bad_steps": self._bad}, rows=rows)
        log.warning(
            "step %d changed nothing: its loss is %g, the norm of its gradient %g. It had %s%s.",
            step, loss, norm, ", ".join(names), more,
        )  # fmt: skip

    def _speed(self, step: int) -> dict[str, float]:
        """Images per second, the share of the time that the host waited for input, that of the GPU's peak, all since
        the last report; and the memory."""
        if step <= self._since:
            return {}
        seconds, steps = time.monotonic() - self._started, step - self._since
        values = {
            "train/images_per_second": steps * self._batch_size / seconds,
            "train/input_wait": self._waited / seconds,
        }
        if self._peak:
            values["train/mfu"] = steps * self._run.step_flops / (seconds * self._peak)
        values["train/memory_gib"] = devices.most_memory() / 2**30
        self.restart(step)
        return values
