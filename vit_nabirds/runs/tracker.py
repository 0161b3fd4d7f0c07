"""What a run reports: metrics.jsonl, the trackers, and lines in the log above a panel."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable

import numpy as np

from vit_nabirds.config.plan import Plan
from vit_nabirds.runs.metrics import MetricsFile
from vit_nabirds.runs.progress import Progress
from vit_nabirds.runs.quantities import in_words
from vit_nabirds.runs.trackers import FINAL, RunInfo
from vit_nabirds.runs.trackers.background import Background
from vit_nabirds.runs.trackers.identity import Identity
from vit_nabirds.runs.trackers.mlflow import MLflow
from vit_nabirds.runs.trackers.tensorboard import TensorBoard
from vit_nabirds.runs.trackers.wandb import Wandb
from vit_nabirds.terminal import shown_below

log = logging.getLogger("vit_nabirds")

SERVERS = {"mlflow": MLflow, "wandb": Wandb}


class Tracker:
    """Reports scalars, text and pictures of a run, and continues the files of one that stopped at `info.start`.

    One process of a job is the writer; the calls of the others do nothing.
    """

    def __init__(
        self,
        info: RunInfo,
        plan: Plan,
        names: tuple[str, ...],
        is_writer: bool,
        saved: Callable[[], int | None] = lambda: None,
    ) -> None:
        """To the trackers of these names, and TensorBoard. `saved` returns the step of the newest checkpoint."""
        self._plan, self._is_writer = plan, is_writer
        if is_writer:
            self._progress = Progress(plan, info.start, saved)
            self._metrics = MetricsFile(info.workdir / "metrics.jsonl", info.start)
            self._tensorboard, self._identity = TensorBoard(info), Identity(info, self._metrics.earlier)
            self._servers = {
                name: Background(name, functools.partial(SERVERS[name], info, self._identity))
                for name in names
                if name in SERVERS
            }
            self._panel = contextlib.ExitStack()
            self._panel.enter_context(shown_below(self._progress.panel))

    def scalars(self, step: int, values: dict[str, float], **more: int) -> None:
        """One line of metrics.jsonl (with `more`), one point of each curve, one line of the log."""
        if not self._is_writer:
            return
        epoch = self._plan.epoch(step)
        self._metrics.write({"step": step, "epoch": epoch, "time": round(time.time(), 3), **values, **more})
        self._give(step, values)
        self._progress.figures(step, values)
        text = ", ".join(filter(None, [in_words(values), self._progress.left if "train/loss" in values else ""]))
        log.info("step %d/%d, epoch %.2f: %s", step, self._plan.total_steps, epoch, text)

    def finals(self, step: int, values: dict[str, float]) -> None:
        """What the run has come to, for the trackers: runs are compared by it."""
        if self._is_writer:
            self._give(step, {FINAL + name: value for name, value in values.items()})

    def _give(self, step: int, values: dict[str, float]) -> None:
        self._tensorboard.scalars(step, values)
        for name, server in self._servers.items():
            if new := self._identity.unreported(name, step, values):
                server.scalars(step, new)

    def progress(self, step: int) -> None:
        if self._is_writer:
            self._progress.step(step)

    def text(self, name: str, markdown: str) -> None:
        if self._is_writer:
            for backend in (self._tensorboard, *self._servers.values()):
                backend.text(name, markdown)

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        """uint8 (height, width, 3)"""
        if self._is_writer:
            for backend in (self._tensorboard, *self._servers.values()):
                backend.images(name, step, picture)

    def close(self) -> None:
        if self._is_writer:
            self._panel.close()
            self._metrics.close()
            for backend in (self._tensorboard, *self._servers.values()):
                backend.close()
