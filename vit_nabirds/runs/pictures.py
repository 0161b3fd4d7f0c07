"""Pictures of what a run does, large enough in their parts to be read as small as TensorBoard shows them.

All functions return uint8 (height, width, 3). matplotlib is imported where it draws: each process of a job would wait
for it, and one draws.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_nabirds.errors import quoted, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE, GAP, SIZE = 200, 10, 26  # pixels of a photograph in a row, between two, and of the letters below
ROWS = 2  # of a caption's line that is too long for one
RIGHT, WRONG = "#4477aa", "#cc6677"


def draw_row(images: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """float32 photographs (n, size, size, 3) in [0, 1], each above its lines: the first black, the others grey."""
    font, line = _font(), round(1.2 * SIZE)
    texts = [[wrapped(text, font, SIDE) for text in caption] for caption in captions]
    height = SIDE + 2 * GAP + max(sum(map(len, text)) for text in texts) * line
    row = Image.new("RGB", (len(images) * (SIDE + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(row)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, pixels = GAP + i * (SIDE + GAP), Image.fromarray(np.asarray(image * 255 + 0.5).clip(0, 255).astype(np.uint8))
        row.paste(
            pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST if SIDE > 2 * image.shape[0] else None), (x, GAP)
        )
        lines = [(words, "dimgray" if number else "black") for number, rows in enumerate(text) for words in rows]
        for number, (words, color) in enumerate(lines):
            draw.text((x, GAP + SIDE + number * line), words, color, font)
    return np.asarray(row)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """Of matplotlib: it has the letters of most names."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), SIZE)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """At most ROWS lines that are not wider, broken at spaces and hyphens; what does not fit ends with '…'."""
    rows = [""]
    for part in re.findall(r"\s*[^\s-]*-*", quoted(text)):
        joined = rows[-1] + part
        if not rows[-1] or len(rows) == ROWS or font.getlength(joined) <= width:
            rows[-1] = joined.lstrip()
        else:
            rows.append(part.lstrip())
    return [_shortened(row, font, width) for row in rows]


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    while font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def draw_confusion(names: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """int (classes, classes) counts of (truth, answer) of a few species: numbered, so that long names fit."""
    size, colored = len(names), counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with _figure("Confused most: truth by row, answer by column") as (figure, axes):
        mistakes = np.where(np.eye(size, dtype=bool), 0, colored)
        axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=2 * mistakes.max() or 1, aspect="auto")
        for (truth, answer), count in np.ndenumerate(counts):
            if count:
                weight = "bold" if truth == answer else "normal"
                axes.text(answer, truth, f"{count}", ha="center", va="center", weight=weight)
        axes.set_xticks(range(size), [str(number) for number in range(1, size + 1)])
        axes.xaxis.tick_top()
        axes.set_yticks(range(size), [f"{_short(name)}  {number}" for number, name in enumerate(names, 1)])
        return _drawn(figure)


def draw_accuracies(names: Sequence[str], right: np.ndarray, total: np.ndarray, title: str) -> np.ndarray:
    """A bar for each species: so many of its photographs are right."""
    with _figure(title) as (figure, axes):
        shares = right / total
        axes.barh(range(len(names)), shares, color=RIGHT)
        axes.barh(range(len(names)), 1 - shares, left=shares, color=WRONG)
        for row, share in enumerate(shares):
            axes.text(0.02, row, f"{100 * share:.0f} % of {total[row]}", va="center", color="white", weight="bold")
        axes.set_yticks(range(len(names)), map(_short, names))
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        return _drawn(figure)


def draw_confidence(probabilities: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """How sure the answers are that turn out right and wrong."""
    title = f"How sure: {is_right.sum():,} right answers, {(~is_right).sum():,} wrong"
    with _figure(title) as (figure, axes):
        bins, colors = np.linspace(0, 1, 11), [RIGHT, WRONG]
        parts = [probabilities[is_right], probabilities[~is_right]]
        axes.hist(parts, bins, stacked=True, color=colors, label=["right", "wrong"], rwidth=0.9)
        axes.set_xticks(bins[::2], [f"{100 * edge:.0f} %" for edge in bins[::2]])
        axes.set_xlabel("probability of the likeliest species")
        axes.set_ylabel("photographs")
        axes.legend(loc="upper left")
        return _drawn(figure)


def _short(name: str) -> str:
    return quoted(name, 26)


@contextlib.contextmanager
def _figure(title: str) -> Iterator[tuple["Figure", "Axes"]]:
    """With large letters. A '$' in a name is a '$'."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 15, "text.parse_math": False}):
        figure = Figure(figsize=(6.4, 3.8), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.suptitle(visible(title), x=0.01, ha="left", fontsize=15, weight="bold")
        yield figure, axes


def _drawn(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn for it
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
