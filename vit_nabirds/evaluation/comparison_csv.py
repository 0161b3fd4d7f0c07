"""The table of `compare` as a .csv file."""

from pathlib import Path

import polars as pl

from vit_nabirds.config.fields import value_in_words
from vit_nabirds.data.foreign import without_formulas
from vit_nabirds.errors import visible
from vit_nabirds.evaluation.comparison import COLUMNS, Row, differing


def write_csv(rows: list[Row], file: Path) -> None:
    """A row for each run, with the ends of intervals in columns of their own."""
    fields = {name: [row.value(name) for row in rows] for name in differing(rows)}
    columns = {"run": [visible(str(row.run.workdir)) for row in rows]} | fields
    for name in (name for name in COLUMNS if name != "run" and any(row.value(name) is not None for row in rows)):
        columns[name] = [row.value(name) for row in rows]
        ends = [row.intervals.get(name) or (None, None) for row in rows]
        if any(end != (None, None) for end in ends):
            columns |= {f"{name}_low": [low for low, _ in ends], f"{name}_high": [high for _, high in ends]}
    columns["problem"] = [visible(row.run.problem) for row in rows]
    table = pl.DataFrame([_series(name, values) for name, values in columns.items()])
    table.with_columns(without_formulas(pl.col(pl.String))).write_csv(file)


def _series(name: str, values: list) -> pl.Series:
    """Numbers as numbers, anything else as text."""
    if all(value is None or type(value) in (int, float) for value in values):
        return pl.Series(name, values, pl.Float64 if any(type(value) is float for value in values) else pl.Int64)
    return pl.Series(name, ["" if value in (None, "") else value_in_words(value) for value in values], pl.String)
