"""What a run reports: metrics.jsonl, TensorBoard, and lines in the log above a progress bar."""

import json
import logging
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tqdm import tqdm

from vit_nabirds.config.plan import Plan
from vit_nabirds.runs.events import Events
from vit_nabirds.runs.grid import draw_grid
from vit_nabirds.runs.metrics import split_metrics

log = logging.getLogger("vit_nabirds")


class Tracker:
    """Writes scalars, text and pictures of a run, and continues the files of one that stopped at step `start`.

    One process of a job is the writer; the calls of the others do nothing.
    """

    def __init__(self, workdir: Path, plan: Plan, start: int, is_writer: bool) -> None:
        self._plan, self._is_writer = plan, is_writer
        if is_writer:
            file = workdir / "metrics.jsonl"
            lines, damaged = split_metrics(file)
            if damaged:
                aside = file.with_suffix(".damaged")
                with aside.open("ab") as unread:
                    unread.writelines(line + b"\n" for line in damaged)
                log.warning("%s: %d line(s) could not be read and are in %s now", file, len(damaged), aside.name)
            lines = [line for line in lines if line["step"] <= start]  # later ones are trained again
            partial = file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(file)
            self._metrics, self._unwritten = file.open("ab", buffering=0), b""
            self._events = Events(workdir / "tensorboard", start + 1)
            self._bar = tqdm(total=plan.total_steps, initial=start, unit="step", disable=None)

    def scalars(self, step: int, values: dict[str, float], **more: int) -> None:
        """One line of metrics.jsonl (with `more`), one point of each TensorBoard curve, one line of the log."""
        if not self._is_writer:
            return
        epoch = self._plan.epoch(step)
        line = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values, **more}
        self._write(json.dumps(line).encode() + b"\n")
        self._events.add(step, *(summary.scalar(name, value) for name, value in values.items()))
        text = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items())
        with tqdm.external_write_mode():  # the line goes above the progress bar
            log.info("step %d/%d, epoch %.2f: %s", step, self._plan.total_steps, epoch, text)

    def progress(self, step: int) -> None:
        if self._is_writer:
            self._bar.update(step - self._bar.n)

    def text(self, name: str, markdown: str) -> None:
        if self._is_writer:
            self._events.add(0, summary.text(name, markdown))

    def images(self, name: str, step: int, images: np.ndarray, captions: list[tuple[str, str]]) -> None:
        """float32 images (n, size, size, 3) in [0, 1] as a grid, each above its two lines of caption."""
        if self._is_writer:
            self._events.add(step, summary.image(name, draw_grid(images, captions), dataformats="HWC"))

    def _write(self, line: bytes) -> None:
        """Lines that a full disk does not take are kept until it does."""
        had_room, self._unwritten = not self._unwritten, self._unwritten + line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            if had_room:
                log.warning("%s cannot be written (%s): its lines wait", self._metrics.name, error.strerror)

    def close(self) -> None:
        if self._is_writer:
            self._bar.close()
            self._write(b"")
            if self._unwritten:
                log.warning("%d lines of %s are lost", self._unwritten.count(b"\n"), self._metrics.name)
            self._metrics.close()
            self._events.close()
