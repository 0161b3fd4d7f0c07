"""Compare runs, finished or not: what differs in their configurations, and their figures, time and speed."""

import difflib
import logging
import operator
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vit_nabirds.commands.files import check_file
from vit_nabirds.config.fields import fields, short_name
from vit_nabirds.errors import ConfigError, UserError, quoted, shown
from vit_nabirds.evaluation.comparison import COLUMNS, Row, rows_of, show, views_of
from vit_nabirds.runs.summary import find_runs

log = logging.getLogger("vit_nabirds")

REQUIRED = ()
POSITIONAL = "workdir"
FLAGS = {
    "workdir": ([], "Workdir of a run, or a folder with runs below it; also without --workdir=, as in compare runs/*."),
    "sort": (str, "Column or field to sort by, like test or learning_rate; -test puts the largest first."),
    "where": (
        [],
        "Only runs of which this holds, like 'optimizer.learning_rate<1e-4' or state=finished, with = != < <= > or >=; "
        "may be given several times.",
    ),
    "out": (str, "File to write instead, .csv (time in seconds) or .html."),
}
PARALLEL = False
CONFIGURED = ""
OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


def run(options, group) -> int:
    conditions = [Condition.parse(text) for text in options.where]
    out = options.out and Path(options.out)
    if out:
        check_file("out", out, (".csv", ".html"))
    rows = rows_of(workdirs_in(options.workdir))
    kept = [row for row in rows if all(condition.holds(row) for condition in conditions)]
    if not kept:
        raise UserError(f"--where={' --where='.join(options.where)}: of {len(rows)} runs it holds for none.")
    kept = in_order(kept, options.sort)
    if out is None:
        show(views_of(kept))
    else:
        write(kept, out)
        log.info("%s: %d runs", out, len(kept))
    return 0


def workdirs_in(given: list[str]) -> list[Path]:
    """The runs in and below these folders; one without any is a run that has not started. UserError for no folder."""
    if not given:
        raise ConfigError("compare needs the workdirs of runs, or folders with some, like compare runs/*")
    workdirs = []
    for path in map(Path, given):
        if path.is_dir():
            found = find_runs(path) or [
                run for link in sorted(path.iterdir()) if link.is_symlink() for run in find_runs(link)
            ]
            if not found and any(path.iterdir()) and not (path / "config.json").exists():
                raise UserError(f"{quoted(path)} holds no run, nor does a folder below it.")
            workdirs += found or [path]
        elif not path.exists():
            raise UserError(f"{quoted(path)}: there is no such folder. Give workdirs of runs, or folders with some.")
    if not workdirs:
        raise UserError(f"{quoted(given[0])} is a file: give workdirs of runs, or folders with some.")
    first = {workdir.resolve(): workdir for workdir in reversed(workdirs)}  # each run once, whatever it is called
    return [workdir for workdir in dict.fromkeys(workdirs) if first[workdir.resolve()] == workdir]


def column_of(name: str, flag: str) -> str:
    """The column that a name means: one of the table, or a field, whose section may be left out where only one section
    has such a field. ConfigError for another name."""
    from vit_nabirds.config.flags import nearest

    known = {column: column for column in COLUMNS}
    known |= {short_name(field): field for field, _ in fields()} | {field: field for field, _ in fields()}
    if name in known:
        return known[name]
    near = dict.fromkeys([*difflib.get_close_matches(name, known, cutoff=0.7), *filter(None, [nearest(name)])])
    others = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COLUMNS)} and all fields."
    raise ConfigError(f"{flag}: there is no column {shown(name)}; {others}")


class Condition(NamedTuple):
    """Of a row, like optimizer.learning_rate<1e-4."""

    text: str
    column: str
    compare: Callable[[Any, Any], bool]
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        found = re.fullmatch(r"\s*([\w./]+)\s*(<=|>=|!=|=|<|>)=?\s*(.*?)\s*", text, re.DOTALL)
        if not found:
            raise ConfigError(
                f"--where={quoted(text)}: write a field or column, one of {' '.join(OPERATORS)} and a value, like "
                "optimizer.learning_rate<1e-4."
            )
        name, sign, value = found.groups()
        return cls(text, column_of(name, f"--where={quoted(text)}"), OPERATORS[sign], value)

    def holds(self, row: Row) -> bool:
        """Never for a run without such a value. ConfigError where the value is of another kind."""
        has = row.value(self.column)
        if has is None:
            return False
        is_names = isinstance(has, tuple) and all(isinstance(value, str) for value in has)
        if is_names or isinstance(has, bool | str):
            if self.compare not in (operator.eq, operator.ne):
                raise ConfigError(f"--where={quoted(self.text)}: {self.column} is no number, so use = or !=.")
            if isinstance(has, bool) and self.value.lower() not in ("true", "false"):
                raise ConfigError(f"--where={quoted(self.text)}: {self.column} is True or False.")
            return self.compare((",".join(has) if is_names else str(has)).lower(), self.value.lower())
        try:
            wanted = tuple(float(part) for part in self.value.strip("()[] ").split(","))
        except ValueError:
            raise ConfigError(
                f"--where={quoted(self.text)}: {self.column} is a number like {has}, and {shown(self.value)} is none."
            ) from None
        return self.compare(tuple(has) if isinstance(has, list | tuple) else (has,), wanted)


def in_order(rows: list[Row], sort: str | None) -> list[Row]:
    """Sorted by a column; -COLUMN puts the largest first. Rows without a value come last."""
    if not sort:
        return rows
    column = column_of(sort.removeprefix("-"), f"--sort={quoted(sort)}")
    has = [row for row in rows if row.value(column) is not None]
    has.sort(key=lambda row: row.value(column), reverse=sort.startswith("-"))
    return has + [row for row in rows if row.value(column) is None]


def write(rows: list[Row], out: Path) -> None:
    """A .csv or .html file, completely or not at all."""
    from vit_nabirds.evaluation.comparison_csv import write_csv
    from vit_nabirds.evaluation.pages import write_page

    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as unfinished:
        file = Path(unfinished) / "table"
        if out.suffix == ".csv":
            write_csv(rows, file)
        else:
            write_page(file, "runs.html", views=views_of(rows))
        file.replace(out)
