"""The tables of `compare` and `sweep`: a row for each run, a second table where runs differ in their seeds alone."""

import datetime
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vit_nabirds.config.fields import short_name, value_in_words
from vit_nabirds.errors import visible
from vit_nabirds.evaluation.figures import wilson
from vit_nabirds.runs.summary import FINISHED, Summary, read_summary

# What a table has besides the fields that differ; test_loss and the like only where some run selects by them.
COLUMNS = {
    "run": "run", "state": "state", "step": "step",
    "validation": "validation accuracy", "test": "test accuracy",
    "validation_mean_class_accuracy": "validation mean class accuracy", "validation_loss": "validation loss",
    "test_mean_class_accuracy": "test mean class accuracy", "test_loss": "test loss",
    "time": "time", "images_per_second": "images/s",
}  # fmt: skip
UNKNOWN = "–"


class Row(NamedTuple):
    """A run, or several that differ in the seed alone."""

    name: str
    run: Summary  # of several the first
    figures: dict[str, Any]  # by column; None: there is none
    intervals: dict[str, list[float]]  # by column

    def value(self, name: str) -> Any:
        """Of a column or field."""
        return self.figures[name] if name in self.figures else self.run.fields.get(name)


class Cell(NamedTuple):
    text: str
    note: str = ""  # an interval
    value: Any = None  # to sort by


class View(NamedTuple):
    """A table as it is shown: its first column, those of fields, and those of figures."""

    title: str
    first: str
    fields: list[str]
    figures: list[str]
    rows: list[dict[str, Cell]]
    notes: list[str]

    @property
    def headers(self) -> list[str]:
        return [self.first, *self.figures, *self.fields]

    def is_number(self, header: str) -> bool:
        """Whether a column has numbers alone, and at least one."""
        values = [row[header].value for row in self.rows if row[header].value is not None]
        return bool(values) and all(type(value) in (int, float) for value in values)


def rows_of(workdirs: list[Path]) -> list[Row]:
    """A row for each run, named by its path below the folder that has them all."""
    top = os.path.commonpath([workdir.absolute().parent for workdir in workdirs])
    return [_row(read_summary(workdir), os.path.relpath(workdir.absolute(), top)) for workdir in workdirs]


def _row(run: Summary, name: str) -> Row:
    test, evaluation = (run.results or {}).get("test", {}), run.evaluation
    step = run.results["selected"]["step"] if run.results else evaluation.get("step")
    figures = {"run": name, "state": run.state, "step": step}
    intervals = {}
    for figure in dict.fromkeys(["accuracy", run.fields.get("evaluate.select", "accuracy")]):
        end = "" if figure == "accuracy" else f"_{figure}"
        figures |= {f"validation{end}": evaluation.get(f"val/{figure}"), f"test{end}": test.get(figure)}
        intervals[f"test{end}"] = test.get(f"{figure}_interval")
    share, examples = figures["validation"], evaluation.get("val/examples", 0)
    if share is not None and 0 <= share <= 1 <= examples:
        intervals["validation"] = wilson(share, examples)
    return Row(name, run, figures | {"time": run.seconds, "images_per_second": run.images_per_second}, intervals)


def differing(rows: list[Row]) -> list[str]:
    """The fields in which the runs that have a configuration differ."""
    found = [row.run.fields for row in rows if row.run.fields]
    return [name for name in (found[0] if found else ()) if any(fields[name] != found[0][name] for fields in found)]


def views_of(rows: list[Row]) -> list[View]:
    """The table of all runs and, if some differ in their seeds alone, that of their means."""
    notes = [visible(f"{row.name}: {row.run.problem}") for row in rows if row.run.problem]
    if any(filter(None, (interval for row in rows for interval in row.intervals.values()))):
        notes.append("95 % intervals in parentheses.")
    if len({_tested_on(row) for row in rows if row.run.results}) > 1:
        notes.insert(0, "The runs were tested on different photographs: their figures cannot be compared.")
    if any(row.run.state != FINISHED and row.value("validation") is not None for row in rows):
        notes.append("Of runs that are not finished, step and validation are those of the latest evaluation.")
    views = [_view("", "run", differing(rows), rows, notes)]
    if means := over_seeds(rows):
        views.append(_view("Means over seeds, ranges in parentheses", "configuration", [], means, []))
    return views


def _tested_on(row: Row) -> tuple:
    """What tells different test photographs apart."""
    return row.run.photographs, row.value("data.label"), row.run.results["test"]["examples"]


def over_seeds(rows: list[Row]) -> list[Row]:
    """A row for each configuration that has finished with several seeds, in the order of the first of each."""
    groups = {}
    for row in rows:
        if row.run.state == FINISHED:
            same = row.run.fields | {"seed": None, "data.root": row.run.photographs}
            groups.setdefault(repr(same), []).append(row)
    several = [group for group in groups.values() if len({row.value("seed") for row in group}) > 1]
    names = [name for name in differing([group[0] for group in several]) if name != "seed"]
    return [_mean(group, names) for group in several]


def _mean(group: list[Row], names: list[str]) -> Row:
    """Of runs, called by the values of these fields."""
    name, seeds = _said(names, group[0]) or "the same", ", ".join(str(row.value("seed")) for row in group)
    figures, intervals = {"configuration": name, "seeds": f"{len(group)} ({seeds})", "state": None, "step": None}, {}
    for column in [
        column for column in group[0].figures if column in COLUMNS and column not in ("run", "state", "step")
    ]:
        values = [row.value(column) for row in group if row.value(column) is not None]
        figures[column] = statistics.mean(values) if values else None
        intervals[column] = (
            [min(values), max(values)] if values and column not in ("time", "images_per_second") else None
        )
    return Row(name, group[0].run, figures, intervals)


def _said(names: list[str], row: Row) -> str:
    return ", ".join(f"{short_name(name)}={value_in_words(row.value(name))}" for name in names)


def _view(title: str, first: str, names: list[str], rows: list[Row], notes: list[str]) -> View:
    columns = {"seeds": "seeds"} | COLUMNS
    figures = [name for name in columns if name != "run" and any(row.value(name) is not None for row in rows)]
    headers = {name: short_name(name) for name in names} | {name: columns[name] for name in figures}
    cells = [{header: _cell(name, row) for name, header in ({first: first} | headers).items()} for row in rows]
    return View(title, first, [headers[name] for name in names], [headers[name] for name in figures], cells, notes)


def _cell(name: str, row: Row) -> Cell:
    value, interval = row.value(name), row.intervals.get(name)
    if value is None:
        return Cell(UNKNOWN)
    if name == "time":
        shown, short = _time, _time
    elif name == "images_per_second":
        shown = short = "{:,.1f}".format
    elif name.startswith(("validation", "test")):
        shown, short = "{:.4f}".format, "{:.3f}".format
    else:
        return Cell(value_in_words(value), "", value_in_words(value) if isinstance(value, str) else value)
    return Cell(shown(value), "–".join(map(short, interval)) if interval else "", value)


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(min(seconds, 1e9))))


def show(views: list[View]) -> None:
    """Print the tables as wide as the terminal, or COLUMNS, or 100."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 100
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for view in views:
        if view.title:
            console.print(Text(f"\n{view.title}", style="bold"))
        tables = [_wide(view)]
        if Measurement.get(console, console.options.update(max_width=10_000), tables[0]).maximum > console.width:
            tables = _narrow(view)
        for table in tables:
            console.print(table, "")
        for note in view.notes:
            console.print(Text(note, style="dim"))


def _wide(view: View) -> Table:
    """With a column for each field, and intervals beside their figures."""
    table = _table(view.first, [*view.fields, *view.figures])
    for row in view.rows:
        figures = [f"{x.text} ({x.note})" if x.note else x.text for x in (row[name] for name in view.figures)]
        table.add_row(row[view.first].text, *(row[name].text for name in view.fields), *figures)
    return table


def _narrow(view: View) -> list[Table]:
    """With intervals below their figures, and what differs in a table of its own, but for what a run's name says."""
    figures = _table(view.first, [name.replace(" ", "\n", 1) for name in view.figures])
    fields = _table(view.first, ["what differs"], justify="left")
    for row in view.rows:
        cells = [f"{x.text}\n({x.note})" if x.note else x.text for x in (row[name] for name in view.figures)]
        figures.add_row(name := row[view.first].text, *cells)
        said = [f"{field}={row[field].text}" for field in view.fields if row[field].value is not None]
        if more := [text for text in said if text not in name.split(",")]:
            fields.add_row(name, ", ".join(more))
    return [figures, *([fields] if fields.rows else [])]


def _table(first: str, others: list[str], justify: Any = "right") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, overflow="fold", justify="left" if name == "state" else justify)
    return table
