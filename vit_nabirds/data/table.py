"""The table of a prepared folder: metadata.parquet, checked, with labels that start at 0 and a split for each row."""

import hashlib
import json
import re
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.names import clean_name
from vit_nabirds.data.foreign import PARQUET_ERRORS, check_storage, read_parquet, read_text
from vit_nabirds.data.splits import held_out
from vit_nabirds.errors import ConfigError, UserError, quoted

COLUMNS = ("path", "species_name", "photographer", "is_training_img")
CLASSES = {"species": "species_name", "category": "subcategory"}  # config.data.label: the column with the class
# What `prepare` knows of its images: the checksum of the file, and where the bird is in it, in pixels.
BIRD = ("bird_x", "bird_y", "bird_width", "bird_height")
KNOWN = {"crc32": pl.UInt32} | dict.fromkeys(BIRD, pl.Int32)
SPLIT = pl.Enum(["train", "validation", "test"])
PREPARED = "prepared.json"  # the settings that a folder's images were made with
SKIPPED = "skipped.csv"  # photographs that `prepare` left out


def read_table(root: Path, label: str = "species", validation: float = 0.0) -> pl.DataFrame:
    """One row per photograph of a prepared folder, ours or the course's.

    Adds class_name, label (int32, from 0 in the order of the names) and split: "train", "test", or "validation" for
    about that share of the training photographs. UserError if metadata.parquet is missing or unreadable, or holds a
    wrong value.
    """
    file = root / "metadata.parquet"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: give a folder that `main.py prepare` has finished as --config.data.root (to "
            "`evaluate` and `report`, as --data_root)."
        )
    try:
        present = pl.read_parquet_schema(file).keys()
    except PARQUET_ERRORS as error:
        check_storage(file, error)
        raise UserError(f"{file} is not a readable Parquet file ({quoted(error)}): prepare the folder again.") from None
    needed = COLUMNS + (BIRD if present & set(BIRD) else ())
    if missing := [name for name in needed if name not in present]:
        columns = quoted(", ".join(present))
        raise UserError(f"{file} has no column {missing[0]!r} (its columns: {columns}): prepare the folder again.")
    if CLASSES[label] not in present:
        raise ConfigError(
            f"config.data.label is {label!r}, but {file} has no column {CLASSES[label]!r}: prepare the folder again, "
            "or train on its species."
        )
    table = _read(file, [*COLUMNS, *(name for name in ("source", "subcategory", "node", *KNOWN) if name in present)])
    table = table.with_columns(_cleaned(table[name]) for name in CLASSES.values() if name in table.columns)
    _check(table, file)
    table = table.with_columns(
        is_training_img=pl.col("is_training_img").cast(pl.Boolean),
        class_name=pl.col(CLASSES[label]),
        subcategory="subcategory" if "subcategory" in present else "species_name",
    )
    table = table.with_columns(label=pl.col("class_name").rank("dense").cast(pl.Int32) - 1)
    return table.with_columns(split=_split(table, validation, file))


def _read(file: Path, columns: list[str]) -> pl.DataFrame:
    types = dict.fromkeys(columns, pl.String) | {"is_training_img": pl.Int8} | KNOWN
    try:
        table = read_parquet(file, columns=columns)
    except PARQUET_ERRORS as error:
        check_storage(file, error)
        raise UserError(f"{file} is not a readable Parquet file ({quoted(error)}): prepare the folder again.") from None
    try:
        if table["is_training_img"].dtype.is_float():  # a cast would make 0 of 0.9
            raise pl.exceptions.InvalidOperationError("is_training_img has fractions")
        table = table.with_columns(pl.col(name).cast(types[name]) for name in columns)
    except PARQUET_ERRORS as error:
        raise UserError(f"{file} has a column of the wrong type ({quoted(error)}): prepare the folder again.") from None
    return table.with_columns(pl.col("photographer").str.strip_chars())


def _cleaned(names: pl.Series) -> pl.Series:
    """With NFC and single spaces. Each different name once, because there are millions of rows and few names."""
    different = names.unique()
    cleaned = different.to_frame("name").select(clean_name(pl.col("name")))["name"]
    return names.replace_strict(different, cleaned, return_dtype=pl.String).rename(names.name)


def _check(table: pl.DataFrame, file: Path) -> None:
    """UserError for the first row that cannot be right."""
    names = [name for name in ("path", "species_name", "source", "subcategory") if name in table.columns]
    wrong = {f"an empty {name}": pl.col(name).fill_null("") == "" for name in names}
    wrong["an empty photographer"] = pl.col("photographer") == ""  # null: unknown
    wrong["is_training_img other than 0 and 1"] = ~pl.col("is_training_img").is_in([0, 1]).fill_null(False)
    wrong["a path that leads out of its folder"] = pl.col("path").str.contains(r"^/|(^|/)\.\.(/|$)|\x00")
    known = [name for name in KNOWN if name in table.columns]
    wrong[f"no {', '.join(known)}"] = pl.any_horizontal(pl.col(known).is_null()) if known else pl.lit(False)
    wrong["a path that another row has too"] = pl.col("path").is_duplicated()
    for problem, is_wrong in wrong.items():
        rows = table.with_row_index("row").filter(is_wrong)
        if rows.height:
            raise UserError(
                f"{file}, row {rows['row'][0]} ({quoted(rows['path'][0])}) has {problem}: correct it, or prepare the "
                "folder again."
            )


def _split(table: pl.DataFrame, validation: float, file: Path) -> pl.Series:
    """Of each row."""
    training = table["is_training_img"]
    held = pl.zeros(len(table), pl.Boolean, eager=True)
    if validation:
        if not training.any():
            raise UserError(f"{file} has no training images: prepare an archive that has some.")
        held = held.scatter(training.arg_true(), held_out(_photographs(table.filter(training)), validation))
        if not held.any():
            raise ConfigError(
                f"config.data.validation is {validation}, but that holds out none of the {training.sum():,} training "
                f"photographs of {file}: each species has too few of them, or all of one photographer. Give a larger "
                "share, or 0."
            )
    kind = pl.when(held).then(pl.lit("validation")).when(training).then(pl.lit("train")).otherwise(pl.lit("test"))
    return table.select(split=kind.cast(SPLIT))["split"]


def _photographs(table: pl.DataFrame) -> pl.DataFrame:
    """With the photograph's path instead of the image's: all birds that were cut out of one stay on one side."""
    return table.with_columns(path="source") if "source" in table.columns else table


def class_names(table: pl.DataFrame) -> list[str]:
    """The names of the classes in the order of their labels."""
    return table.select("label", "class_name").unique().sort("label")["class_name"].to_list()


def read_prepared(root: Path) -> str:
    """The text of prepared.json, or "" without one, as in the course's folder."""
    file = root / PREPARED
    try:
        return read_text(file, 2**20) if file.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is damaged ({error}): prepare the folder again.") from None


def left_out_of(root: Path) -> int:
    """How many photographs `prepare` left out."""
    skipped = pl.read_parquet_metadata(root / "metadata.parquet").get("skipped", "0")
    return int(skipped) if re.fullmatch("[0-9]{1,12}", skipped) else 0


def settings_of(root: Path) -> dict:
    """The settings that the folder's images were made with; empty for the course's folder."""
    try:
        return dict(json.loads(read_prepared(root) or "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{root / PREPARED} is damaged ({quoted(error)}): prepare the folder again.") from None


def fingerprint(root: Path, table: pl.DataFrame) -> str:
    """A hash of paths, classes, splits and the settings in prepared.json, independent of where the folder is."""
    # Named and numbered as before there was a validation split: runs of that time go on.
    number = pl.col("split").cast(pl.String).replace_strict({"train": "1", "test": "0", "validation": "2"})
    rows = table.select("path", species_name="class_name", is_training_img=number).sort("path")
    return hashlib.sha256((rows.write_csv() + read_prepared(root)).encode()).hexdigest()[:16]


def class_differences(of_run: list[str], of_data: list[str]) -> str:
    """How many classes each has, and the first few that only one of them has."""
    text = f"the run {len(of_run)}, the data {len(of_data)}"
    for who, ours, theirs in (("run", of_run, of_data), ("data", of_data, of_run)):
        if only := sorted(set(ours) - set(theirs)):
            text += f"; only in the {who}: {', '.join(only[:5])}{', …' if len(only) > 5 else ''}"
    return text
