"""Curves and diagrams as SVG that stands in a page: its colours are the page's, its text is the page's font."""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import polars as pl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vit_nabirds.evaluation.figures import wilson

# What is drawn in these colours has those of the page, light or dark: `--NAME` in style.css.
COLOURS = {"muted": "#020202", "line": "#030303", "one": "#040404", "two": "#050505", "soft": "#060606"}
STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"], "axes.labelcolor": COLOURS["muted"],
    "xtick.color": COLOURS["line"], "ytick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"], "grid.color": COLOURS["line"], "grid.linewidth": 0.5, "axes.grid": True,
    "axes.axisbelow": True, "axes.labelsize": 9.5,
}  # fmt: skip
WIDTH, HEIGHT = 5.0, 2.7  # inches of 72 pixels
MOST_POINTS = 300  # of a curve
PERCENT = PercentFormatter(1, decimals=0, symbol=" %")


class Curve(NamedTuple):
    points: Sequence[tuple[float, float]]  # (epoch, value)
    colour: str = "one"
    is_dotted: bool = False  # evaluations, a dot each


def curves(lines: Sequence[Curve], percent: bool = False) -> Markup:
    """Over the epochs, on one pair of axes that starts at zero, or for shares ends at 100 %."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            x, y = _thinned(line.points)
            kind, width = ("o--", 1.2) if line.is_dotted else ("-" if len(x) > 1 else "o", 1.6)
            axes.plot(x, y, kind, color=COLOURS[line.colour], markersize=3.5, linewidth=width, clip_on=False)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.set_xlim(left=0)
        low, high = axes.dataLim.intervaly  # of the finite values
        ends = (min(low, 0.99), 1.0) if percent else (0.0, high if high > 0 else 1.0)
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(*ends)
        axes.set(yticks=ticks, ylim=ticks[[0, -1]])
        axes.yaxis.set_major_formatter(PERCENT if percent else "{x:g}")
        return _svg(figure)


def _thinned(points: Sequence[tuple[float, float]]) -> np.ndarray:
    """(2, at most MOST_POINTS): means over neighbours."""
    parts = np.array_split(np.array(points, float), min(len(points), MOST_POINTS))
    return np.array([part.mean(0) for part in parts]).T


def reliability(bins: pl.DataFrame, number: int) -> Markup:
    """How often predictions of a probability are right, with 95 % intervals, and below it how many they are. `bins` are
    those of `calibration`, of `number` on the whole range."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], "--", color=COLOURS["muted"], linewidth=1)
        x, accuracy = bins["probability"].to_numpy(), bins["accuracy"].to_numpy()
        ends = np.array([wilson(*row) for row in bins.select("accuracy", "examples").iter_rows()])
        upper.vlines(x, *ends.T, color=COLOURS["one"], linewidth=1.2)
        upper.plot(x, accuracy, "o", color=COLOURS["one"], markersize=5, clip_on=False)
        upper.set(ylabel="of them right", xlim=(0, 1.01), ylim=(-0.02, 1.02))
        lower.bar((bins["bin"] + 0.5) / number, bins["examples"], 0.9 / number, color=COLOURS["soft"])
        lower.set(xlabel="probability of the prediction", ylabel="photographs")
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        for axis in (upper.yaxis, upper.xaxis):
            axis.set_major_formatter(PERCENT)
        figure.align_ylabels()
        return _svg(figure)


def _svg(figure: Figure) -> Markup:
    """The drawing with the page's colours, and without what the page must not have twice, as ids, or has no use for."""
    file = io.StringIO()
    figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis|LineCollection)_\d+"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)  # the page says how large it is
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(re.sub(r"\n\s*", "\n", text))  # its only words are numbers and those above
