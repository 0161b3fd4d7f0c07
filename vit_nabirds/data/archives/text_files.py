"""The text files that NABirds and CUB-200-2011 share: `<key> <value>` rows, a file for each kind of value."""

import re
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.listing import BOX, Listing, refuse
from vit_nabirds.data.foreign import read_text
from vit_nabirds.errors import UserError, quoted

_MOST_BYTES = 2**28  # five million rows
_TEXT = ["UUID", "path", "photographer", "subcategory"]
# A value of each column as a regular expression. Numbers have at most nine digits, so that their sums fit, and not
# those of other scripts, which \d means too.
_VALUE = dict.fromkeys(["class_id", "parent_id", "width", "height"], r"([0-9]{1,9})")
_VALUE |= dict.fromkeys(_TEXT, r"(\S.*)") | {"UUID": r"(\S+)", "is_training_img": r"([01])"}
_BOX = {"whole pixels": r"(-?[0-9]{1,9})", "pixels": r"(-?[0-9]{1,9}(?:\.[0-9]*)?)"}
# What messages say about a row's place: the file that holds the value.
_FILES = {"path": "images.txt", "label": "classes.txt", "box": "bounding_boxes.txt", "split": "train_test_split.txt"}


def join_files(kind: str, folder: Path, forms: dict[str, str]) -> Listing:
    """The photographs in the order of images.txt. `forms` has the columns of a row of each file, as messages show them.

    Raises UserError with file and row if the files are malformed or contradict each other.
    """
    if missing := [name for name in forms if not (folder / name).is_file()]:
        raise UserError(f"{folder}: no {', '.join(missing)} in it. Name the folder of the unpacked archive.")
    images, labels = folder / "images.txt", folder / "image_class_labels.txt"
    table = read_rows(images, forms[images.name])
    if table.is_empty():
        raise UserError(f"{images}: it lists no photograph. Unpack the archive again.")
    _refuse(images, table.filter(pl.col("path").is_duplicated()), "path {path} is in two rows. Keep one.")
    # Prepared images get the same relative path, which must not lead out of their folder.
    outside = table.filter(pl.col("path").str.contains(r"^/|//|\\|(^|/)\.\.?(/|$)|/$|\x00"))
    _refuse(images, outside, "path {path} is not of the form <folder>/<file>, as 0817/0000.jpg. Correct it.")
    table = table.rename({"row": "images.txt row"})
    for name in (name for name in forms if name not in ("images.txt", "classes.txt")):
        other = read_rows(folder / name, forms[name]).rename({"row": f"{name} row"})
        table = table.join(other, on="UUID", how="left", maintain_order="left")
        without = table.filter(pl.col(f"{name} row").is_null()).with_columns(row="images.txt row")
        _refuse(images, without, f"{{UUID}} has no row in {name}. Add it there or delete this row.")
    classes = read_rows(folder / "classes.txt", forms["classes.txt"]).rename({"row": "classes.txt row"})
    table = table.join(classes, on="class_id", how="left", maintain_order="left")
    nameless = table.filter(pl.col("subcategory").is_null()).with_columns(row=f"{labels.name} row")
    _refuse(labels, nameless, "class id {class_id} of {UUID} is not in classes.txt. Correct one.")
    split = pl.when(pl.col("is_training_img") == 1).then(pl.lit("train")).otherwise(pl.lit("test"))
    return Listing(
        kind=kind,
        folder=folder / "images",
        table=table.rename({"path": "source"}).with_columns(split=split),
        where=lambda row, what: f"{folder / _FILES[what]}, row {row[_FILES[what] + ' row']}",
        split_place=folder / "train_test_split.txt",
        split_remedy=" (no row ends in {digit}). Both splits are needed: take this file from the original archive",
        extra=("UUID", "class_id"),
        one_class=True,
    )


def read_rows(file: Path, form: str) -> pl.DataFrame:
    """The columns of a file, and `row`, counted from 1."""
    columns, box = re.findall(r"<(\w+)>", form), _BOX["whole pixels" if "whole pixels" in form else "pixels"]
    patterns = _VALUE | dict.fromkeys(BOX, box)
    try:
        lines = read_text(file, _MOST_BYTES).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 text ({quoted(error)}). Unpack the archive again.") from error
    table = pl.DataFrame({"line": lines}, schema={"line": pl.String}).with_row_index("row", offset=1)
    table = table.with_columns(pl.col("line").str.strip_chars()).filter(pl.col("line") != "")
    pattern = "^" + r"\s+".join(patterns[name] for name in columns) + "$"
    fields = pl.col("line").str.extract_groups(pattern).struct.rename_fields(columns)
    table = table.with_columns(fields.alias("fields")).unnest("fields")
    key = columns[0]
    _refuse(file, table.filter(pl.col(key).is_null()), f"'{{line}}' is not of the form {form}. Correct it.")
    _refuse(file, table.filter(pl.col(key).is_duplicated()), f"{key} {{{key}}} is in two rows. Keep one.")
    types = {name: pl.Float64 if name in BOX else pl.Int64 for name in columns if name not in _TEXT}
    return table.drop("line").cast(types)


def _refuse(file: Path, bad: pl.DataFrame, message: str) -> None:
    refuse(bad, lambda row: f"{file}, row {row['row']}", message)
