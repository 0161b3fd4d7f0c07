"""JSON in COCO's form, as iNaturalist's too: images, annotations (with or without boxes) and categories."""

import collections
import json
import mmap
from collections.abc import Callable
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.listing import BOX, Listing, refuse, relative_paths
from vit_nabirds.data.archives.names import clean_name
from vit_nabirds.data.foreign import MOST_BYTES, read_bytes
from vit_nabirds.errors import UserError, quoted

_RANKS = ["kingdom", "phylum", "class", "order", "family", "genus"]
_COLUMNS = {
    "images": ["id", "file_name", "width", "height", "rights_holder", "photographer"],
    "annotations": ["image_id", "category_id", "bbox", "iscrowd"],
    "categories": ["id", "name", "supercategory", *_RANKS],
}
_NEEDED = {"images": ["id", "file_name"], "annotations": ["image_id", "category_id"], "categories": ["id", "name"]}
_KEPT = {*_COLUMNS, *(name for names in _COLUMNS.values() for name in names)}


def read(files: dict[Path, str | None], folder: Path) -> Listing:
    """A row for each annotation of JSON files whose paths are relative to `folder`, each file of the split given."""
    notes = collections.Counter()
    parts = [_read_one(file, split, folder, notes) for file, split in files.items()]
    trees = [tree for _, tree in parts]
    return Listing(
        kind="COCO",
        folder=folder,
        table=pl.concat([table for table, _ in parts]),
        where=lambda row, what: f"{row['file']}, annotations[{row['row']}]",
        split_place=next(iter(files)) if len(files) == 1 else folder,
        split_remedy=". Name a folder with a JSON file for each split, with train and test (or val) in their names",
        notes=notes,
        taxonomy=None if any(tree is None for tree in trees) else pl.concat(trees).unique("node", maintain_order=True),
        repeats=True,
    )


def fits(file: Path) -> bool:
    """Whether a file's text speaks of images and annotations."""
    length = min(file.stat().st_size, MOST_BYTES)
    if not length:
        return False
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ) as text:
        return text.find(b'"annotations"') >= 0 and text.find(b'"images"') >= 0


def _read_one(file: Path, split: str | None, folder: Path, notes: collections.Counter) -> tuple:
    """The annotations as a table, and the tree of the categories (None if they have none)."""
    images, annotations, categories = _parse(file)
    images = relative_paths(images.rename({"file_name": "source"}), folder, _place(file, "images"), split)
    unlabelled = images.join(annotations, left_on="id", right_on="image_id", how="anti")
    notes["photographs have no annotation and were left out"] += unlabelled.height
    crowds = annotations["iscrowd"].is_in(["1", "true"]).fill_null(False)
    notes["annotations of crowds were left out"] += crowds.sum()
    tree, categories = _tree(categories)
    table = annotations.filter(~crowds)
    for one, frame in (("image", images), ("category", categories)):
        frame = frame.drop("row").rename({"id": f"{one}_id"})
        unknown = table.join(frame, on=f"{one}_id", how="anti", maintain_order="left")
        refuse(unknown, _place(file, "annotations"), f"no {one} has the id {{{one}_id}}. Correct it.")
        table = table.join(frame, on=f"{one}_id", how="left", maintain_order="left")
    sizes = [pl.when(pl.col(side) > 0).then(side) for side in ("width", "height")]
    holder = pl.coalesce("rights_holder", "photographer")
    table = table.with_columns(*sizes, file=pl.lit(str(file)), split=pl.lit(split, pl.String), photographer=holder)
    table = table.rename({"name": "subcategory"}).drop("bbox", "iscrowd", "rights_holder", "image_id", "category_id")
    return table, tree


def _place(file: Path, key: str) -> Callable[..., str]:
    return lambda row, what="": f"{file}, {key}[{row['row']}]"


def _parse(file: Path) -> list[pl.DataFrame]:
    """images, annotations and categories: _COLUMNS as text, sizes and boxes as numbers, and `row` from 0."""
    try:
        # What is not needed is dropped while parsing: a file of 2.7 million photographs would fill the memory.
        data = json.loads(read_bytes(file), object_hook=lambda found: {k: v for k, v in found.items() if k in _KEPT})
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({quoted(error)}). Download or write it again.") from None
    frames = []
    for key, names in _COLUMNS.items():
        rows = data.get(key) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not rows or set(map(type, rows)) != {dict}:
            raise UserError(
                f"{file}: no {key} in it, or not objects in a list. It needs images, annotations and categories in "
                "COCO's form."
            )
        frame = pl.DataFrame([_column(file, key, name, [row.get(name) for row in rows]) for name in names])
        frames.append(frame.with_row_index("row"))
        for name in _NEEDED[key]:
            refuse(frames[-1].filter(pl.col(name).is_null()), _place(file, key), f"no {name} in it. Add it.")
        if key != "annotations":
            double = frames[-1].filter(pl.col("id").is_duplicated())
            refuse(double, _place(file, key), "id {id} is in two rows. Correct one.")
    frames[1] = _with_boxes(file, frames[1])
    return frames


def _column(file: Path, key: str, name: str, values: list) -> pl.Series:
    dtype = {"width": pl.Int64, "height": pl.Int64, "bbox": pl.List(pl.Float64)}.get(name, pl.String)
    fits, form = (_is_box, "[left, top, width, height]") if name == "bbox" else (_is_plain, "text or a number")
    unfit = (row for row, value in enumerate(values) if value is not None and not fits(value))
    if (row := next(unfit, None)) is not None:
        raise UserError(f"{file}, {key}[{row}]: {name} is not {form}. Correct it.")
    try:
        return pl.Series(name, values, dtype, strict=False)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{file}: {name} '{quoted(error.object)}' of {key} is not Unicode text. Write it in UTF-8."
        ) from None


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or isinstance(value, int | float) and not abs(value) > 2**63


def _is_box(value: object) -> bool:
    """Whether it is a list of numbers; how many they must be is for a message that shows them."""
    return isinstance(value, list) and all(_is_plain(side) and not isinstance(side, str) for side in value)


def _with_boxes(file: Path, annotations: pl.DataFrame) -> pl.DataFrame:
    box = pl.col("bbox").list
    wrong = annotations.filter((box.len() > 0) & ((box.len() != 4) | (box.drop_nulls().list.len() != box.len())))
    refuse(wrong, _place(file, "annotations"), "bbox {bbox} is not [left, top, width, height]. Correct it.")
    return annotations.with_columns(box.get(at, null_on_oob=True).alias(name) for at, name in enumerate(BOX))


def _tree(categories: pl.DataFrame) -> tuple[pl.DataFrame | None, pl.DataFrame]:
    """node, parent and name for each rank (or supercategory) and category; and the categories with their node.

    A node is the path to it, as /Animalia/Chordata/Aves: the same in several files, whatever the ids are. It has no
    white space, as no node of NABirds has.
    """
    ranks = (
        _RANKS if categories.select(pl.any_horizontal(pl.col(_RANKS).is_not_null().any())).item() else ["supercategory"]
    )
    nothing = {"name": [""]}  # in the others, "none" is what programs write for it
    names = {name: clean_name(pl.col(name)) for name in (*ranks, "name")}
    names = [pl.when(~text.is_in(nothing.get(name, ["", "none"]))).then(text) for name, text in names.items()]
    levels = categories.select(names)
    if levels.select(pl.all_horizontal(pl.col(ranks).is_null().all())).item():
        return None, categories.select("row", "id", "name", node=pl.lit(None, pl.String))
    steps = [pl.col(level).str.replace_many(["%", "/", " "], ["%25", "%2F", "%20"]) for level in levels.columns]
    nodes = [pl.lit("/")]
    nodes += [nodes[0] + pl.concat_str(steps[: k + 1], separator="/", ignore_nulls=True) for k in range(len(steps))]
    tree = [pl.DataFrame({"node": ["/"], "parent": [None], "name": ["all"]}, schema_overrides={"parent": pl.String})]
    for level, parent, node in zip(levels.columns, nodes, nodes[1:], strict=False):
        tree.append(levels.filter(pl.col(level).is_not_null()).select(node=node, parent=parent, name=level))
    node = levels.select(nodes[-1].alias("node"))["node"]
    return pl.concat(tree).unique("node", maintain_order=True), categories.select("row", "id", "name", node)
