"""The text files of an NABirds archive as one polars table, a row for each photograph."""

from pathlib import Path

import polars as pl

from vit_nabirds.errors import UserError

# file: its columns, a row of it as users are told it looks, the same as a regular expression with a group for
# each column. Numbers have at most nine digits, so that sums of what matches always fit.
_LAYOUT = {
    "images.txt": (("UUID", "path"), "<UUID> <path>", r"^(\S+)\s+(\S.*)$"),
    "image_class_labels.txt": (("UUID", "class_id"), "<UUID> <class id>", r"^(\S+)\s+(\d{1,9})$"),
    "bounding_boxes.txt": (
        ("UUID", "bb_x", "bb_y", "bb_width", "bb_height"),
        "<UUID> <x> <y> <width> <height> (whole pixels)",
        r"^(\S+)\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})$",
    ),
    "sizes.txt": (
        ("UUID", "width", "height"),
        "<UUID> <width> <height> (whole pixels)",
        r"^(\S+)\s+(\d{1,9})\s+(\d{1,9})$",
    ),
    "photographers.txt": (("UUID", "photographer"), "<UUID> <name>", r"^(\S+)\s+(\S.*)$"),
    "train_test_split.txt": (
        ("UUID", "is_training_img"),
        "<UUID> <1 for train or 0 for test>",
        r"^(\S+)\s+([01])$",
    ),
    "classes.txt": (("class_id", "subcategory"), "<class id> <name>", r"^(\d{1,9})\s+(\S.*)$"),
}
_TEXT = {"UUID", "path", "photographer", "subcategory"}
_COLUMNS = ["UUID", "bb_x", "bb_y", "bb_width", "bb_height", "class_id", "subcategory", "path", "photographer"]
_COLUMNS += ["width", "height", "is_training_img", "species_name", "species_id"]


def read_archive(folder: str | Path) -> pl.DataFrame:
    """One row a photograph, in the order of images.txt; UserError for whatever the files contradict."""
    return read_archive_with_notes(folder)[0]


def read_archive_with_notes(folder: str | Path) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table of `read_archive`, and a count for each thing in it that is worth telling the user."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Name the unpacked NABirds archive (it holds images.txt).")
    if missing := [name for name in _LAYOUT if not (folder / name).is_file()]:
        raise UserError(f"{folder}: no {', '.join(missing)} in it. Name the folder of the unpacked archive.")

    images = folder / "images.txt"
    table = _read(images)
    if table.is_empty():
        raise UserError(f"{images}: it lists no photograph. Unpack the archive again.")
    _refuse(images, table.filter(pl.col("path").is_duplicated()), "path {path} stands in two rows. Keep one.")
    # Prepared images go to the same relative path: it must not lead out of the folder.
    outside = table.filter(pl.col("path").str.contains(r"^/|//|\\|(^|/)\.\.?(/|$)"))
    _refuse(images, outside, "path {path} is not of the form <folder>/<file>, as 0817/0000.jpg. Correct it.")

    for name in list(_LAYOUT)[1:-1]:
        other = _read(folder / name).rename({"row": f"{name} row"})
        table = table.join(other, on="UUID", how="left", maintain_order="left")
        without = table.filter(pl.col(f"{name} row").is_null())
        _refuse(images, without, f"{{UUID}} has no row in {name}. Add it there or delete this row.")
    labels, boxes = "image_class_labels.txt", "bounding_boxes.txt"
    classes = _read(folder / "classes.txt").drop("row")
    table = table.join(classes, on="class_id", how="left", maintain_order="left")
    nameless = table.filter(pl.col("subcategory").is_null()).with_columns(row=f"{labels} row")
    _refuse(folder / labels, nameless, "class id {class_id} of {UUID} is not in classes.txt. Correct one.")

    width, height = pl.col("width"), pl.col("height")
    left, top = pl.col("bb_x"), pl.col("bb_y")
    right, bottom = left + pl.col("bb_width"), top + pl.col("bb_height")
    clamped = table.select(((left < 0) | (top < 0) | (right > width) | (bottom > height)).sum()).item()
    table = table.with_columns(
        bb_x=left.clip(0, width),
        bb_y=top.clip(0, height),
        bb_width=right.clip(0, width) - left.clip(0, width),
        bb_height=bottom.clip(0, height) - top.clip(0, height),
        is_training_img=pl.col("is_training_img") == 1,
        subcategory=_one_space(pl.col("subcategory")),
        species_name=species_of(pl.col("subcategory")),
    )
    empty = table.filter(pl.min_horizontal("bb_width", "bb_height") <= 0).with_columns(row=f"{boxes} row")
    _refuse(folder / boxes, empty, "the box of {UUID} has no area in its {width}x{height} image. Correct it.")
    for split, value in (("train", True), ("test", False)):
        if not (table["is_training_img"] == value).any():
            raise UserError(
                f"{folder / 'train_test_split.txt'}: no {split} photograph (no row ends in {value:d}). "
                "Both splits are needed: take this file from the original archive."
            )
    trained = table.filter("is_training_img")["species_name"].n_unique()
    notes = {
        "boxes stuck out of their image and were clamped": clamped,
        "species have no train photograph": table["species_name"].n_unique() - trained,
    }
    return with_species_ids(table).select(_COLUMNS), notes


def species_of(name: pl.Expr) -> pl.Expr:
    """A class name without its trailing plumage, white space normalised: "Teal  (Adult )" is "Teal"."""
    return _one_space(name.str.replace(r"\s*\([^()]*\)\s*$", ""))


def with_species_ids(table: pl.DataFrame) -> pl.DataFrame:
    """The table with species_name normalised and species_id made from it: int32, from 0, names sorted."""
    table = table.with_columns(species_name=species_of(pl.col("species_name")))
    return table.with_columns(species_id=pl.col("species_name").rank("dense").cast(pl.Int32) - 1)


def _one_space(text: pl.Expr) -> pl.Expr:
    return text.str.replace_all(r"\s+", " ").str.strip_chars()


def _read(file: Path) -> pl.DataFrame:
    """The columns of one file plus `row`, counted from 1."""
    columns, form, pattern = _LAYOUT[file.name]
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # read_text makes CRLF into LF
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 text ({error}). Unpack the archive again.") from error
    table = pl.DataFrame({"line": lines}, schema={"line": pl.String}).with_row_index("row", offset=1)
    table = table.with_columns(pl.col("line").str.strip_chars()).filter(pl.col("line") != "")
    fields = pl.col("line").str.extract_groups(pattern).struct.rename_fields(columns)
    table = table.with_columns(fields.alias("fields")).unnest("fields")
    key = columns[0]
    _refuse(file, table.filter(pl.col(key).is_null()), f"'{{line}}' is not of the form {form}. Correct it.")
    _refuse(file, table.filter(pl.col(key).is_duplicated()), f"{key} {{{key}}} stands in two rows. Keep one.")
    return table.drop("line").with_columns(pl.col(c).cast(pl.Int64) for c in columns if c not in _TEXT)


def _refuse(file: Path, bad: pl.DataFrame, message: str) -> None:
    """Raises UserError if there is a bad row; `message` is filled with the columns of the first one."""
    if bad.height:
        first = bad.row(0, named=True)
        others = f" ({bad.height - 1} more like it.)" if bad.height > 1 else ""
        raise UserError(f"{file}, row {first['row']}: {message.format(**first)}{others}")
