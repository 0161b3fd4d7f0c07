"""The table of a prepared folder: metadata.parquet, checked, with labels that start at 0."""

import hashlib
from pathlib import Path

import polars as pl

from vit_nabirds.data.archive import with_species_ids
from vit_nabirds.errors import UserError

COLUMNS = ("path", "species_name", "photographer", "is_training_img")
PREPARED = "prepared.json"  # the settings that a folder's images were made with
PARQUET_ERRORS = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)  # polars panics on damaged bytes


def read_table(root: Path) -> pl.DataFrame:
    """One row per photograph of a prepared folder, ours or the course's, with species_id (int32) renumbered.

    Raises UserError if metadata.parquet is missing or unreadable, or holds a wrong value.
    """
    file = root / "metadata.parquet"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: give a folder that `main.py prepare` has finished as --config.data.root (to "
            "`evaluate`, as --data_root)."
        )
    try:
        table = pl.read_parquet(file)
    except PARQUET_ERRORS as error:
        raise UserError(f"{file} is not a readable Parquet file ({error}): prepare the folder again.") from None
    if missing := [name for name in COLUMNS if name not in table.columns]:
        columns = ", ".join(table.columns)
        raise UserError(f"{file} has no column {missing[0]!r} (its columns: {columns}): prepare the folder again.")
    text = COLUMNS[:3]
    try:
        table = table.with_columns(pl.col(text).cast(pl.String).str.strip_chars(), pl.col(COLUMNS[3]).cast(pl.Int8))
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file} has a column of the wrong type ({error}): prepare the folder again.") from None
    wrong = {f"an empty {name}": pl.col(name).fill_null("") == "" for name in text}
    wrong["is_training_img other than 0 and 1"] = ~pl.col("is_training_img").is_in([0, 1]).fill_null(False)
    wrong["a path that another row has too"] = pl.col("path").is_duplicated()
    for problem, is_wrong in wrong.items():
        rows = table.with_row_index("row").filter(is_wrong)
        if rows.height:
            raise UserError(
                f"{file}, row {rows['row'][0]} ({rows['path'][0]}) has {problem}: correct it, or prepare the folder "
                "again."
            )
    return with_species_ids(table.with_columns(pl.col("is_training_img").cast(pl.Boolean)))


def species_names(table: pl.DataFrame) -> list[str]:
    """The species' names in the order of their labels."""
    return table.select("species_id", "species_name").unique().sort("species_id")["species_name"].to_list()


def read_prepared(root: Path) -> str:
    """The text of prepared.json, or "" without one, as in the course's folder."""
    file = root / PREPARED
    return file.read_text() if file.exists() else ""


def fingerprint(root: Path, table: pl.DataFrame) -> str:
    """A hash of paths, labels, splits and the settings in prepared.json, independent of where the folder is."""
    rows = table.select("path", "species_name", pl.col("is_training_img").cast(pl.Int8)).sort("path")
    return hashlib.sha256((rows.write_csv() + read_prepared(root)).encode()).hexdigest()[:16]


def species_differences(of_run: list[str], of_data: list[str]) -> str:
    """How many species each has, and the first few that only one of them has."""
    text = f"the run {len(of_run)}, the data {len(of_data)}"
    for who, ours, theirs in (("run", of_run, of_data), ("data", of_data, of_run)):
        if only := sorted(set(ours) - set(theirs)):
            text += f"; only in the {who}: {', '.join(only[:5])}{', …' if len(only) > 5 else ''}"
    return text
