"""What a run says of itself: metrics.jsonl, TensorBoard and lines in the log."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import SummaryWriter
from tqdm import tqdm

from vit_nabirds.errors import UserError

log = logging.getLogger("vit_nabirds")


class Monitor:
    """Writes scalars, texts and pictures of one run; continues the files of a run that was stopped at `start`.

    Of many processes one is the writer; the others' calls do nothing.
    """

    def __init__(self, workdir: Path, start: int, total_steps: int, is_writer: bool):
        self._is_writer, self._total_steps = is_writer, total_steps
        if is_writer:
            file = workdir / "metrics.jsonl"
            lines = [line for line in read_metrics(file) if line["step"] <= start]  # those after it are trained again
            partial = file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(file)
            self._metrics = file.open("a")
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
            self._bar = tqdm(total=total_steps, initial=start, unit="step", disable=None)

    def scalars(self, step: int, values: dict[str, float], **more: int) -> None:
        """One line of metrics.jsonl (with `more`), one point of each TensorBoard curve, one line of the log."""
        if not self._is_writer:
            return
        self._metrics.write(json.dumps({"step": step, **values, **more}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        text = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items())
        with tqdm.external_write_mode():  # the line goes above the progress bar
            log.info("step %d/%d: %s", step, self._total_steps, text)

    def progress(self, step: int) -> None:
        if not self._is_writer:
            return
        self._bar.update(step - self._bar.n)

    def text(self, name: str, markdown: str) -> None:
        if not self._is_writer:
            return
        self._events.add_text(name, markdown, 0)

    def images(self, name: str, step: int, images: np.ndarray, captions: list[tuple[str, str]]) -> None:
        """float32 images (n, size, size, 3) in [0, 1] as a grid, each above its two lines of caption."""
        if not self._is_writer:
            return
        self._events.add_image(name, draw_grid(images, captions), step, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        if not self._is_writer:
            return
        self._bar.close()
        self._metrics.close()
        self._events.close()


class Throughput:
    """Images per second, and the share of the time that the host waited for input, since the last reading."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self.restart(None)

    def restart(self, step: int | None) -> None:
        """Count from now on, at the end of `step`; None: not yet."""
        self._step, self._start, self._waited = step, time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def read(self, step: int) -> dict[str, float]:
        if self._step is None or step == self._step:
            return {}
        seconds = time.monotonic() - self._start
        images = (step - self._step) * self._batch_size
        values = {"train/images_per_second": images / seconds, "train/input_wait": self._waited / seconds}
        self.restart(step)
        return values


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line that was cut short by a crash is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    values = []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                values.append(json.loads(line))
            except ValueError:
                raise UserError(f"{file}, line {number} is not JSON: delete that line.") from None
    return values


def read_evaluations(file: Path) -> dict[int, dict]:
    """The evaluations in metrics.jsonl by step."""
    lines = [line for line in read_metrics(file) if "test/accuracy" in line]
    return {line["step"]: {name: value for name, value in line.items() if name != "step"} for line in lines}


def draw_grid(images: np.ndarray, captions: list[tuple[str, str]], columns: int = 4) -> np.ndarray:
    """float32 (n, size, size, 3) in [0, 1] -> uint8 (height, width, 3)."""
    side, gap, line = max(images.shape[1], 160), 8, 15
    cell = (side + gap, side + 2 * line + gap)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell[0], gap + i // columns * cell[1]
        pixels = Image.fromarray(np.asarray(image * 255 + 0.5).clip(0, 255).astype(np.uint8))
        grid.paste(pixels.resize((side, side), Image.Resampling.NEAREST if side > image.shape[0] else None), (x, y))
        for j, text in enumerate(caption):
            while draw.textlength(text, font) > side:
                text = text.removesuffix("…")[:-1] + "…"
            draw.text((x, y + side + j * line), text, "black" if j == 0 else "dimgray", font)
    return np.asarray(grid)
