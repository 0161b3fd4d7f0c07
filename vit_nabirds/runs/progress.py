"""How far a training is: a panel on a terminal, and the time that is left."""

import time
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vit_nabirds.config.plan import Plan
from vit_nabirds.runs.quantities import in_words, time_in_words

SHOWN = {"loss", "accuracy", "mean_class_accuracy", "images_per_second", "input_wait", "mfu", "memory_gib"}


class Progress:
    """Only keeps what it is given: a thread draws it, so that no step waits for the terminal."""

    def __init__(
        self, plan: Plan, start: int, saved: Callable[[], int | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`saved` returns the step of the newest checkpoint."""
        self._plan, self._saved, self._clock = plan, saved, clock
        self._step, self._first = start, None  # step and time at which the first step was done
        self._figures: dict[str, str] = {}  # the newest of each split, in words
        self._checkpoint: tuple[int | None, float] = (None, 0.0)  # and when it was first seen

    def step(self, step: int) -> None:
        self._step = step
        self._first = self._first or (step, self._clock())

    def figures(self, step: int, values: dict[str, float]) -> None:
        if shown := {name: value for name, value in values.items() if name.rpartition("/")[2] in SHOWN}:
            split = next(iter(shown)).partition("/")[0]
            self._figures[split] = in_words(shown) + (f" (step {step})" if split != "train" else "")

    @property
    def left(self) -> str:
        """Like '1 h 12 min left', at the mean speed since the first step, evaluations and all; '' before the second."""
        done = self._step - self._first[0] if self._first else 0
        if not done or self._step >= self._plan.total_steps:
            return ""
        seconds = (self._clock() - self._first[1]) / done * (self._plan.total_steps - self._step)
        return f"{time_in_words(seconds)} left"

    def panel(self) -> RenderableType:
        """Its lines are cut where the terminal ends."""
        plan, step, now = self._plan, self._step, self._clock()
        if (saved := self._saved()) != self._checkpoint[0]:
            self._checkpoint = saved, now
        first = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):
            first.add_column(ratio=ratio, no_wrap=True, overflow="crop")
        epochs = f"epoch {plan.epoch(step):.2f} of {plan.epoch(plan.total_steps):.3g}"
        first.add_row(epochs, ProgressBar(plan.total_steps, step), f"step {step:,}/{plan.total_steps:,}", self.left)
        lines = list(self._figures.values()) or ["waiting for the first step"]
        if saved is not None:
            lines.append(f"checkpoint of step {saved:,}, {time_in_words(now - self._checkpoint[1])} ago")
        return Group(Text(), first, *(Text(line, no_wrap=True, overflow="crop") for line in lines), Text())
