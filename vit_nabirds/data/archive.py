"""The text files of an NABirds archive as one table, a row per photograph."""

import re
from pathlib import Path

import polars as pl

from vit_nabirds.errors import UserError

# The columns of a row in each file, as messages show them.
_LAYOUT = {
    "images.txt": "<UUID> <path>",
    "image_class_labels.txt": "<UUID> <class_id>",
    "bounding_boxes.txt": "<UUID> <bb_x> <bb_y> <bb_width> <bb_height> (whole pixels)",
    "sizes.txt": "<UUID> <width> <height> (whole pixels)",
    "photographers.txt": "<UUID> <photographer>",
    "train_test_split.txt": "<UUID> <is_training_img> (1 for train, 0 for test)",
    "classes.txt": "<class_id> <subcategory>",
}
_BOX = ["bb_x", "bb_y", "bb_width", "bb_height"]
_TEXT = ["UUID", "path", "photographer", "subcategory"]
# A value of each column as a regular expression. Numbers have at most nine digits, so that their sums fit.
_VALUE = dict.fromkeys(["class_id", "width", "height"], r"(\d{1,9})") | dict.fromkeys(_BOX, r"(-?\d{1,9})")
_VALUE |= dict.fromkeys(_TEXT, r"(\S.*)") | {"UUID": r"(\S+)", "is_training_img": r"([01])"}
_COLUMNS = ["UUID", *_BOX, "class_id", "subcategory", "path", "photographer", "width", "height", "is_training_img"]
_COLUMNS += ["species_name", "species_id"]


def read_archive(folder: str | Path) -> tuple[pl.DataFrame, dict[str, int]]:
    """The photographs in the order of images.txt, and how many of each oddity there are, to tell the user.

    Raises UserError with file and row if the files are malformed or contradict each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Name the unpacked NABirds archive (it holds images.txt).")
    if missing := [name for name in _LAYOUT if not (folder / name).is_file()]:
        raise UserError(f"{folder}: no {', '.join(missing)} in it. Name the folder of the unpacked archive.")
    table, sticking_out = _clamp_boxes(_join_files(folder), folder / "bounding_boxes.txt")
    table = table.with_columns(
        is_training_img=pl.col("is_training_img") == 1,
        subcategory=_one_space(pl.col("subcategory")),
        species_name=species_of(pl.col("subcategory")),
    )
    for split, value in (("train", True), ("test", False)):
        if not (table["is_training_img"] == value).any():
            raise UserError(
                f"{folder / 'train_test_split.txt'}: no {split} photograph (no row ends in {value:d}). "
                "Both splits are needed: take this file from the original archive."
            )
    trained = table.filter("is_training_img")["species_name"].n_unique()
    notes = {
        "boxes stuck out of their image and were clamped": sticking_out,
        "species have no train photograph": table["species_name"].n_unique() - trained,
    }
    return with_species_ids(table).select(_COLUMNS), notes


def species_of(name: pl.Expr) -> pl.Expr:
    """A class name without the plumage at its end and with single spaces: "Teal  (Adult )" becomes "Teal"."""
    return _one_space(name.str.replace(r"\s*\([^()]*\)\s*$", ""))


def with_species_ids(table: pl.DataFrame) -> pl.DataFrame:
    """The table with species_name normalised, and species_id, int32 from 0 in the order of the names."""
    table = table.with_columns(species_name=species_of(pl.col("species_name")))
    return table.with_columns(species_id=pl.col("species_name").rank("dense").cast(pl.Int32) - 1)


def _one_space(text: pl.Expr) -> pl.Expr:
    return text.str.replace_all(r"\s+", " ").str.strip_chars()


def _join_files(folder: Path) -> pl.DataFrame:
    """The columns of all files, and "<file> row" for the row in each file but classes.txt."""
    images, labels = folder / "images.txt", folder / "image_class_labels.txt"
    table = _read(images)
    if table.is_empty():
        raise UserError(f"{images}: it lists no photograph. Unpack the archive again.")
    _refuse(images, table.filter(pl.col("path").is_duplicated()), "path {path} is in two rows. Keep one.")
    # Prepared images get the same relative path, which must not lead out of their folder.
    outside = table.filter(pl.col("path").str.contains(r"^/|//|\\|(^|/)\.\.?(/|$)"))
    _refuse(images, outside, "path {path} is not of the form <folder>/<file>, as 0817/0000.jpg. Correct it.")
    for name in list(_LAYOUT)[1:-1]:
        other = _read(folder / name).rename({"row": f"{name} row"})
        table = table.join(other, on="UUID", how="left", maintain_order="left")
        without = table.filter(pl.col(f"{name} row").is_null())
        _refuse(images, without, f"{{UUID}} has no row in {name}. Add it there or delete this row.")
    classes = _read(folder / "classes.txt").drop("row")
    table = table.join(classes, on="class_id", how="left", maintain_order="left")
    nameless = table.filter(pl.col("subcategory").is_null()).with_columns(row=f"{labels.name} row")
    _refuse(labels, nameless, "class id {class_id} of {UUID} is not in classes.txt. Correct one.")
    return table


def _clamp_boxes(table: pl.DataFrame, file: Path) -> tuple[pl.DataFrame, int]:
    """The table with every box inside its image, and how many were not."""
    width, height, left, top = pl.col("width"), pl.col("height"), pl.col("bb_x"), pl.col("bb_y")
    right, bottom = left + pl.col("bb_width"), top + pl.col("bb_height")
    sticking_out = table.select(((left < 0) | (top < 0) | (right > width) | (bottom > height)).sum()).item()
    table = table.with_columns(
        bb_x=left.clip(0, width),
        bb_y=top.clip(0, height),
        bb_width=right.clip(0, width) - left.clip(0, width),
        bb_height=bottom.clip(0, height) - top.clip(0, height),
    )
    empty = table.filter(pl.min_horizontal("bb_width", "bb_height") <= 0).with_columns(row=f"{file.name} row")
    _refuse(file, empty, "the box of {UUID} has no area in its {width}x{height} image. Correct it.")
    return table, sticking_out


def _read(file: Path) -> pl.DataFrame:
    """The columns of a file, and `row`, counted from 1."""
    form = _LAYOUT[file.name]
    columns = re.findall(r"<(\w+)>", form)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # read_text turns CRLF into LF
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 text ({error}). Unpack the archive again.") from error
    table = pl.DataFrame({"line": lines}, schema={"line": pl.String}).with_row_index("row", offset=1)
    table = table.with_columns(pl.col("line").str.strip_chars()).filter(pl.col("line") != "")
    pattern = "^" + r"\s+".join(_VALUE[name] for name in columns) + "$"
    fields = pl.col("line").str.extract_groups(pattern).struct.rename_fields(columns)
    table = table.with_columns(fields.alias("fields")).unnest("fields")
    key = columns[0]
    _refuse(file, table.filter(pl.col(key).is_null()), f"'{{line}}' is not of the form {form}. Correct it.")
    _refuse(file, table.filter(pl.col(key).is_duplicated()), f"{key} {{{key}}} is in two rows. Keep one.")
    return table.drop("line").with_columns(pl.col(c).cast(pl.Int64) for c in columns if c not in _TEXT)


def _refuse(file: Path, bad: pl.DataFrame, message: str) -> None:
    """Raise UserError if there is a bad row; the columns of the first one fill the message."""
    if bad.height:
        first = bad.row(0, named=True)
        others = f" ({bad.height - 1} more like it.)" if bad.height > 1 else ""
        raise UserError(f"{file}, row {first['row']}: {message.format(**first)}{others}")
