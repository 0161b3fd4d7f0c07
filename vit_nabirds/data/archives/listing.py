"""What a layout's files say, and the checks that all layouts share."""

import collections
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.names import clean_name, split_of
from vit_nabirds.data.splits import held_out
from vit_nabirds.errors import UserError, quoted

BOX = ["bb_x", "bb_y", "bb_width", "bb_height"]
_COLUMNS = dict.fromkeys(["source", "subcategory", "species_name", "node", "photographer", "split"], pl.String)
_COLUMNS |= dict.fromkeys(BOX, pl.Float64) | {"width": pl.Int64, "height": pl.Int64}
_ORDER = ["path", "source", "subcategory", "species_name", "node", "photographer", "is_training_img", *BOX]
_ORDER += ["width", "height"]
STUCK_OUT = "boxes stuck out of their image and were clamped"
# The place of a row in the archive's files; the text says which of its values matters: "path", "label", "box", "split".
Where = Callable[[dict, str], str]


@dataclasses.dataclass
class Listing:
    """The labelled photographs or boxes that an archive names, one a row, in its order.

    `table` has some of _COLUMNS, and what `where` needs. `split` is "train", "test" or "val", null where nothing says.
    """

    kind: str
    folder: Path  # that `source` is relative to
    table: pl.DataFrame
    where: Where
    split_place: Path | str  # what says which split a photograph is of
    split_remedy: str  # what to do without photographs of {split}, whose number is {digit}
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    taxonomy: pl.DataFrame | None = None
    extra: tuple[str, ...] = ()  # columns of `table` to keep
    one_class: bool = False  # whether a single class is fine
    repeats: bool = False  # whether a photograph may have several rows with the same box


def refuse(bad: pl.DataFrame, where: Callable[[dict], str], message: str) -> None:
    """Raise UserError if there is a bad row; the columns of the first one fill the message."""
    if bad.height:
        first = bad.row(0, named=True)
        others = f" ({bad.height - 1} more like it.)" if bad.height > 1 else ""
        message = message.format(**{name: quoted(value) for name, value in first.items()})
        raise UserError(f"{quoted(where(first), 1000)}: {message}{others}")


def relative_paths(table: pl.DataFrame, folder: Path, where: Where, split: str | None = None) -> pl.DataFrame:
    """The table with `source` relative to `folder`, also where the paths are relative to a folder in it.

    Raises UserError for a path that is empty or leads out of the folder.
    """
    table = table.with_columns(pl.col("source").str.strip_chars().str.replace(r"^(\./+)+", ""))
    empty = table.filter(pl.col("source").fill_null("") == "")
    refuse(empty, lambda row: where(row, "path"), "the path is empty. Fill it in or delete the row.")
    outside = table.filter(pl.col("source").str.contains(r"^/|//|\\|(^|/)\.\.?(/|$)|/$|[\x00\n\r]"))
    remedy = f"is not of the form <folder>/<file> below {folder}, as mallard/0001.jpg. Correct it."
    refuse(outside, lambda row: where(row, "path"), "path {source} " + remedy.replace("{", "{{").replace("}", "}}"))
    first = table["source"][0]
    if not os.path.isfile(folder / first):
        holding = [entry.name for entry in os.scandir(folder) if os.path.isfile(folder / entry.name / first)]
        if len(holding) > 1:
            holding = [name for name in holding if name == "images" or split and split_of(name) == split]
        if len(holding) == 1:
            return table.with_columns(source=pl.lit(f"{holding[0]}/") + pl.col("source"))
    return table


def complete(listing: Listing, crop: str, test_share: float | None) -> pl.DataFrame:
    """The table with all columns of an `Archive`, and oddities added to the notes. UserError for contradictions."""
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in _COLUMNS.items() if name not in listing.table.columns]
    table = _split(_named(listing.table.with_columns(missing), listing), listing)
    table = _one_row_each(_boxed(table, listing, crop), listing, crop)
    if table.is_empty():
        counted = "; ".join(f"{count:,} {note}" for note, count in listing.notes.items() if count)
        raise UserError(f"{listing.split_place}: no photograph is left to use ({counted}). Label some, or draw boxes.")
    table = _with_test(table, listing, test_share)
    table = table.with_columns(path=_different_paths(table["source"]))
    trained = table.filter("is_training_img")["species_name"].n_unique()
    listing.notes["species have no train photograph"] += table["species_name"].n_unique() - trained
    if table["subcategory"].n_unique() == 1 and not listing.one_class:
        raise UserError(
            f"{listing.split_place}: all {table.height:,} photographs are of one class, '"
            f"{quoted(table['subcategory'][0])}'. "
            "Give photographs of at least two."
        )
    return table.select(*_ORDER, *listing.extra)


def _named(table: pl.DataFrame, listing: Listing) -> pl.DataFrame:
    """The table with clean class names, where species_name is the class unless the layout says otherwise."""
    raw = table.select("subcategory", "node").unique()
    table = table.with_columns(label="subcategory", photographer=clean_name(pl.col("photographer")))
    table = table.with_columns(clean_name(pl.col("subcategory")), clean_name(pl.col("species_name")))
    table = table.with_columns(
        pl.col("species_name").fill_null(pl.col("subcategory")),
        pl.when(pl.col("photographer") != "").then("photographer"),
        pl.col("node").first().over("subcategory") if listing.taxonomy is not None else pl.lit(None).alias("node"),
    )
    nameless = table.filter(pl.min_horizontal("subcategory", "species_name").fill_null("") == "")
    message = "the class of {source} has no name ('{label}'). Give it one."
    refuse(nameless, lambda row: listing.where(row, "label"), message)
    merged = raw.height - table["subcategory"].n_unique()
    listing.notes["class names differ from another only in form or white space and were taken for it"] += merged
    names = table["subcategory"].unique()
    listing.notes["class names differ from another only in upper and lower case"] += (
        len(names) - names.str.to_lowercase().n_unique()
    )
    numbers = table["subcategory"].unique().str.contains(r"^[+-]?[\d.]+$")
    listing.notes["classes have numbers for names"] += int(numbers.sum()) if numbers.all() else 0
    return table


def _split(table: pl.DataFrame, listing: Listing) -> pl.DataFrame:
    """The table with is_training_img as the archive says, without photographs of val if there are some of test."""
    sizes = dict(table.group_by("split").len().rows())
    if sizes.get("val") and sizes.get("test"):
        listing.notes["photographs of val were left out: data.validation holds some of train out instead"] += sizes[
            "val"
        ]
        table = table.filter(pl.col("split").fill_null("train") != "val")
    elif sizes.get("val"):
        listing.notes["photographs of val are the test split: there is no other"] += sizes["val"]
    table = table.with_columns(is_training_img=pl.col("split").fill_null("train") == "train")
    both = table.filter(pl.col("is_training_img").n_unique().over("source") > 1).sort("source", maintain_order=True)
    refuse(both, lambda row: listing.where(row, "split"), "{source} is in the train and in the test split. Keep one.")
    return table


def _boxed(table: pl.DataFrame, listing: Listing, crop: str) -> pl.DataFrame:
    """The table with every box inside its image; rows with a part of a box only are refused."""
    if crop == "none":
        return table
    name = pl.col("UUID" if "UUID" in table.columns else "source")
    size = pl.format("{}x{} image", "width", "height").fill_null("image")
    table = table.with_columns(name=name, size=size, boxed=pl.any_horizontal(pl.col(BOX).is_not_null()))

    def place(row: dict) -> str:
        return listing.where(row, "box")

    # As the text files' numbers: sums of larger ones would not be finite.
    wrong = table.filter("boxed", ~pl.all_horizontal(pl.col(BOX).abs() < 1e9).fill_null(False))
    refuse(wrong, place, "the box of {name} is not four numbers ({bb_x}, {bb_y}, {bb_width}, {bb_height}). Correct it.")
    boxes = table.filter("boxed")
    if boxes.height and boxes.select(pl.max_horizontal(BOX).max()).item() <= 1:
        message = "the boxes look like shares of the photograph, as all numbers are up to 1. Give them in pixels."
        refuse(boxes[:1], place, message)
    left, top = pl.col("bb_x"), pl.col("bb_y")
    right, bottom = left + pl.col("bb_width"), top + pl.col("bb_height")
    out = (left < 0) | (top < 0) | (right > pl.col("width")) | (bottom > pl.col("height"))
    # min_horizontal leaves an unknown size out of account
    right, bottom = pl.min_horizontal(right, "width"), pl.min_horizontal(bottom, "height")
    clamped = {"bb_x": left.clip(0), "bb_y": top.clip(0), "bb_width": right - left.clip(0)}
    clamped["bb_height"] = bottom - top.clip(0)
    clamped = [pl.when("boxed").then(value).cast(pl.Float64).alias(name) for name, value in clamped.items()]
    listing.notes[STUCK_OUT] += table.filter("boxed").select(out.sum()).item()
    table = table.with_columns(clamped)
    empty = table.filter(pl.min_horizontal("bb_width", "bb_height") <= 0)
    refuse(empty, place, "the box of {name} has no area in its {size}. Correct it.")
    listing.notes["photographs have no box and are used whole"] += table.height - table["boxed"].sum()
    return table


def _one_row_each(table: pl.DataFrame, listing: Listing, crop: str) -> pl.DataFrame:
    """The table with one row for each box, or for each whole photograph with crop="none" (without boxes, then)."""
    if table["source"].n_unique() < table.height and not listing.repeats:
        refuse(
            table.filter(pl.struct("source", *BOX).is_duplicated()).sort("source", maintain_order=True),
            lambda row: listing.where(row, "path"),
            "path {source} is in two rows (with the same box, if any), here with class {subcategory}. Keep one.",
        )
    if crop == "none":
        table = table.with_columns(pl.lit(None, pl.Float64).alias(name) for name in BOX)
    if table["source"].n_unique() == table.height:
        return table
    classes = pl.col("subcategory").n_unique().over("source", *BOX)
    unclear = table.filter(classes > 1)
    listing.notes["photographs or boxes are of several classes and were left out"] += unclear.select(
        pl.struct("source", *BOX).n_unique()
    ).item()
    table = table.filter(classes == 1)
    once = table.unique(["source", *BOX], keep="first", maintain_order=True)
    listing.notes["further rows of a photograph or box that is used once"] += table.height - once.height
    return once


def _with_test(table: pl.DataFrame, listing: Listing, test_share: float | None) -> pl.DataFrame:
    """The table with `test_share` of each species held out, if it is given. UserError unless there are both splits."""
    place = listing.split_place
    for split, value in (("train", True), ("test", False)):
        if (table["is_training_img"] == value).any() or (split == "test" and test_share is not None):
            continue
        share = ", or give --test_share=0.2 to hold a fifth of each class out" * (split == "test")
        remedy = listing.split_remedy.format(split=split, digit=int(value))
        raise UserError(f"{place}: no {split} photograph{remedy}{share}.")
    if test_share is None:
        return table
    if tested := table.height - table["is_training_img"].sum():
        raise UserError(f"{place}: the archive has a test split of {tested:,} photographs. Leave --test_share out.")
    held = held_out(table.with_columns(path="source"), test_share)
    if not held.any():
        raise UserError(
            f"{place}: --test_share={test_share} of {table.height:,} photographs leaves none to test on. Give a larger "
            "share, or more photographs of each class."
        )
    return table.with_columns(is_training_img=~held)


def _different_paths(source: pl.Series) -> pl.Series:
    """The path of each row: the source, and stem_2.jpg, stem_3.jpg for its further rows, where no other has that."""
    path, line = source, "_"
    while path.n_unique() < len(path):
        number = pl.int_range(1, pl.len() + 1).over("source")
        parts = pl.col("source").str.extract_groups(r"(?s)^(.*?)(\.[^./]*)?$").struct
        numbered = pl.concat_str(parts.field("1"), pl.lit(line), number, parts.field("2").fill_null(""))
        path = source.to_frame("source").select(pl.when(number == 1).then("source").otherwise(numbered)).to_series()
        line += "_"
    return path
