"""A table with a row for each photograph or box: CSV or Parquet."""

import csv
import re
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.listing import BOX, Listing, Where, refuse, relative_paths
from vit_nabirds.data.archives.names import SPLITS
from vit_nabirds.data.foreign import PARQUET_ERRORS, read_bytes, read_parquet
from vit_nabirds.errors import UserError, quoted

SUFFIXES = (".csv", ".tsv", ".parquet")
# What a column may be called; the first name wins over the others.
NAMES = {
    "source": ["path", "file", "filename", "file_name", "image", "filepath"],
    "label": ["label", "class", "class_name", "species", "species_name", "category"],
    "split": ["split", "subset", "set", "partition", "is_training_img", "is_train"],
    "photographer": ["photographer", "rights_holder"],
}
CORNERS = ["xmin", "ymin", "xmax", "ymax"]
_UNCLEAR = {"bb_x", "bb_width", "xmin", "xmax", "x1", "x2", "x_min", "cx", "x_center", "bbox", "bounding_box", "boxes"}
_SIZE = ["width", "height"]
_NUMBERS = {*BOX, *CORNERS, *_SIZE}
_FLAGS = SPLITS | {"1": "train", "0": "test", "true": "train", "false": "test"}


def read(files: dict[Path, str | None], folder: Path, crop: str) -> Listing:
    """The rows of tables whose paths are relative to `folder`, each of the split that its rows or else `files` name."""
    table = pl.concat([_read_one(file, split, folder, crop) for file, split in files.items()], how="diagonal")
    return Listing(
        kind=f"a table ({quoted(', '.join(file.name for file in files))})",
        folder=folder,
        table=table,
        where=lambda row, what: f"{row['file']}, row {row['row']}",
        split_place=next(iter(files)) if len(files) == 1 else folder,
        split_remedy=". Give some rows the value {split} in a column split",
    )


def fits(file: Path) -> bool:
    """Whether a file's columns are those of a table of photographs."""
    try:
        if is_parquet(file):
            return bool(_columns(file, list(pl.read_parquet_schema(file))))
        with open(file, "rb") as opened:
            return bool(_separator(file, opened.readline(1 << 20)))
    except (UserError, *PARQUET_ERRORS):
        return False


def is_parquet(file: Path) -> bool:
    """Whether a file starts as Parquet does, or is called so."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"PAR1" or file.suffix.lower() == ".parquet"


def _read_one(file: Path, split: str | None, folder: Path, crop: str) -> pl.DataFrame:
    """source, subcategory, split, photographer, boxes and sizes as far as the file has them; file and row."""
    table, first = (_read_parquet(file), 1) if is_parquet(file) else (_read_csv(file), 2)  # a CSV's row 1 has the names
    columns = _columns(file, table.columns) | _box_columns(file, table.columns, crop)
    table = pl.DataFrame([_text(file, table[name]).alias(role) for role, name in columns.items()])
    blank = pl.all_horizontal(pl.all().fill_null("") == "")
    table = table.with_columns(blank=blank, file=pl.lit(str(file))).with_row_index("row", offset=first)
    last = table.select(pl.arg_where(~pl.col("blank")).max()).item()
    if last is None:
        raise UserError(f"{file}: it has no row below its column names. Give a row for each photograph.")
    table = _checked(table.head(last + 1), lambda row, what="": f"{file}, row {row['row']}", folder, split)
    return table.rename({"label": "subcategory"}).drop("blank", *CORNERS, strict=False)


def _checked(table: pl.DataFrame, where: Where, folder: Path, split: str | None) -> pl.DataFrame:
    """The columns with their final types. UserError for a row without a value, or with one that is none."""

    def place(row: dict) -> str:
        return where(row, "")

    refuse(table.filter("blank"), place, "the row is empty. Delete it.")
    broken = table.filter(pl.any_horizontal(pl.col("source", "label").str.contains("[\r\n]")))
    refuse(broken, place, "a value goes on in the next row. Close its quotes, or remove the line break.")
    table = relative_paths(table, folder, where, split)
    unlabelled = table.filter(pl.col("label").fill_null("") == "")
    refuse(unlabelled, place, "{source} has no label. Fill it in or delete the row.")
    if table["label"].str.contains(r"^[+-]?\d+(\.0*)?$").all():  # a program wrote 1 as 1.0
        table = table.with_columns(pl.col("label").str.replace(r"\.0*$", ""))
    if "split" in table.columns:
        flag = pl.col("split").str.to_lowercase().str.replace(r"^([01])\.0*$", "$1")
        flags = table.with_columns(flag=flag.replace_strict(_FLAGS, default=None))
        unknown = flags.filter(pl.col("flag").is_null()).with_columns(pl.col("split").fill_null(""))
        refuse(unknown, place, "split '{split}' is not train, test or val (or 1 for train, 0 for test). Correct it.")
        table = table.with_columns(split=flags["flag"])
    else:
        table = table.with_columns(split=pl.lit(split, pl.String))
    for name in table.columns:
        if name in _NUMBERS:
            number = pl.col(name).cast(pl.Float64, strict=False)
            wrong = table.filter(pl.col(name) != "", number.is_null()).with_columns(value=name)
            refuse(wrong, place, f"{name} '{{value}}' is not a number. Correct it.")
            table = table.with_columns(number.fill_nan(None).alias(name))
    if "xmin" in table.columns:
        sides = {"bb_width": pl.col("xmax") - pl.col("xmin"), "bb_height": pl.col("ymax") - pl.col("ymin")}
        table = table.with_columns(bb_x="xmin", bb_y="ymin", **sides)
    sizes = [
        pl.when(pl.col(name) > 0).then(name).cast(pl.Int64, strict=False) for name in _SIZE if name in table.columns
    ]
    return table.with_columns(sizes)


def _columns(file: Path, names: list[str]) -> dict[str, str]:
    """The file's name for each role in NAMES. UserError if path or label is missing, or a role unclear."""
    own, columns = _plain_names(names), {}
    for role, accepted in NAMES.items():
        present = [name for name in accepted if name in own]
        if len(present) > 1 and present[0] != accepted[0]:
            raise UserError(f"{file}: columns {' and '.join(present)} mean the same. Rename one to {accepted[0]}.")
        if present:
            columns[role] = own[present[0]]
        elif role in ("source", "label"):
            wanted = f"no column {accepted[0]} (or {', '.join(accepted[1:])}) among {quoted(', '.join(names))}"
            raise UserError(
                f"{file}: {wanted}. The first row names the columns: path and label, and optionally split, "
                "photographer, bb_x, bb_y, bb_width, bb_height."
            )
    return columns


def _box_columns(file: Path, names: list[str], crop: str) -> dict[str, str]:
    """The columns of the box and of the photograph's size, if there are any. UserError if they may mean others."""
    own = _plain_names(names)
    for box in (BOX, CORNERS):
        if own.keys() >= set(box):
            return {name: own[name] for name in (*box, *_SIZE) if name in own}
    unclear = sorted(own.keys() & _UNCLEAR) or ["x", "y"] * (own.keys() >= {"x", "y"})
    if unclear and crop == "box":
        raise UserError(
            f"{file}: columns {', '.join(unclear)} look like a part or another form of a box. Name its columns bb_x, "
            "bb_y (left, top), bb_width, bb_height, or xmin, ymin, xmax, ymax, in pixels; or give --crop=none."
        )
    return {}


def _plain_names(names: list[str]) -> dict[str, str]:
    """The columns by their names in lower case with underscores; the first of those that are the same then."""
    return {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(names)}


def _text(file: Path, column: pl.Series) -> pl.Series:
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object, pl.Duration):
        raise UserError(
            f"{file}: column {quoted(column.name)} holds {quoted(column.dtype)}, not text or numbers. Give one value a "
            "row."
        )
    column = column.fill_nan(None) if column.dtype.is_float() else column
    return column.cast(pl.String).str.strip_chars()


def _read_parquet(file: Path) -> pl.DataFrame:
    try:
        return read_parquet(file)
    except PARQUET_ERRORS as error:
        raise UserError(f"{file}: not a readable Parquet file ({quoted(error)}). Write it again.") from None


def _separator(file: Path, line: bytes) -> str:
    """The separator of a CSV file, by its first row. UserError if that does not name the columns."""
    text, widest = line.decode("utf-8-sig", errors="replace").strip("\r\n"), []
    for separator in ",;\t":
        try:
            names = next(csv.reader([text], delimiter=separator), [])
        except csv.Error as error:
            raise UserError(f"{file}, row 1: {error}. Correct it.") from None
        if len(names) > len(widest):
            widest, chosen = names, separator
    if len(widest) < 2:
        raise UserError(
            f"{file}: its first row {text[:80]!r} is one column. Separate columns by commas, semicolons or tabs, "
            "and let the first row name them: path and label."
        )
    _columns(file, widest)
    return chosen


def _read_csv(file: Path) -> pl.DataFrame:
    """All columns as text. UserError with the row for what is no CSV in UTF-8."""
    data = read_bytes(file)
    if not data.strip():
        raise UserError(
            f"{file}: it is empty. Give a row for each photograph, below a row with the names of the columns."
        )
    data = data if b"\n" in data else data.replace(b"\r", b"\n")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}, row {row}: not UTF-8 text ({error.reason}). Save the table as CSV in UTF-8."
        ) from None
    separator = _separator(file, data.split(b"\n", 1)[0])
    try:
        return pl.read_csv(data, separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file}{_why(data.decode(), separator) or f': {quoted(error)}'}") from None


def _why(text: str, separator: str) -> str | None:
    """Which row keeps a CSV file from being read."""
    lines = text.split("\n")
    width = len(next(csv.reader(lines[:1], delimiter=separator)))
    for row, line in enumerate(lines, 1):
        try:
            count = len(next(csv.reader([line], delimiter=separator, strict=True), []))
        except csv.Error:
            return f", row {row}: a quote is not closed, or not at the start or end of its value. Correct it."
        if count > width:
            return f", row {row}: {count} columns, and the first row has {width}. Quote values with {separator!r} in."
    return None
