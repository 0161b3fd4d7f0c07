"""NABirds: whole-pixel boxes, sizes, photographers, plumages as classes, and a tree of classes."""

from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.listing import Listing, refuse
from vit_nabirds.data.archives.names import clean_name, species_of
from vit_nabirds.data.archives.text_files import join_files, read_rows
from vit_nabirds.data.taxonomy import DEEPEST
from vit_nabirds.errors import UserError

FORMS = {
    "images.txt": "<UUID> <path>",
    "image_class_labels.txt": "<UUID> <class_id>",
    "bounding_boxes.txt": "<UUID> <bb_x> <bb_y> <bb_width> <bb_height> (whole pixels)",
    "sizes.txt": "<UUID> <width> <height> (whole pixels)",
    "photographers.txt": "<UUID> <photographer>",
    "train_test_split.txt": "<UUID> <is_training_img> (1 for train, 0 for test)",
    "classes.txt": "<class_id> <subcategory>",
}


def read(folder: Path) -> Listing:
    """The photographs, and the tree in hierarchy.txt if there is one."""
    listing = join_files("NABirds", folder, FORMS)
    listing.table = listing.table.with_columns(species_name=species_of(pl.col("subcategory")))
    if (folder / "hierarchy.txt").is_file():
        listing.taxonomy = _read_tree(folder, listing.table)
        listing.table = listing.table.with_columns(node=pl.col("class_id").cast(pl.String))
    return listing


def _read_tree(folder: Path, table: pl.DataFrame) -> pl.DataFrame:
    """node, parent (null at the root) and name of all classes. UserError unless it is one tree with `table`'s."""
    file = folder / "hierarchy.txt"
    edges = read_rows(file, "<class_id> <parent_id>")
    names = read_rows(folder / "classes.txt", FORMS["classes.txt"]).with_columns(name=clean_name(pl.col("subcategory")))
    nameless, names = names.filter(pl.col("name") == ""), names.drop("row")
    refuse(
        nameless,
        lambda row: f"{folder / 'classes.txt'}, row {row['row']}",
        "class id {class_id} has no name. Give one.",
    )

    def place(row: dict) -> str:
        return f"{file}, row {row['row']}"

    for column in ("class_id", "parent_id"):
        unknown = edges.filter(~pl.col(column).is_in(names["class_id"].implode()))
        refuse(unknown, place, f"class id {{{column}}} is not in classes.txt. Correct one.")
    roots = edges.select(class_id="parent_id").unique().filter(~pl.col("class_id").is_in(edges["class_id"].implode()))
    tree = pl.concat(
        [edges, roots.with_columns(row=pl.lit(0, pl.UInt32), parent_id=pl.lit(None, pl.Int64))], how="diagonal"
    )
    rest, reached = tree, roots
    for _ in range(DEEPEST + 1):  # the levels of the tree
        if reached.is_empty():
            break
        rest, reached = (
            rest.join(reached, on="class_id", how="anti"),
            rest.join(reached, left_on="parent_id", right_on="class_id", how="semi").select("class_id"),
        )
    message = f"does not descend from a root in {DEEPEST} steps: its ancestors are a circle, or too many. Correct one."
    refuse(rest, place, f"class id {{class_id}} {message}")
    if roots.height != 1:
        ids = ", ".join(map(str, sorted(roots["class_id"])[:3])) or "none"
        raise UserError(
            f"{file}: a tree has one class without a parent, and here are {roots.height} ({ids}). Correct it."
        )
    absent = table.join(tree, on="class_id", how="anti").with_columns(row="image_class_labels.txt row")
    message = f"class id {{class_id}} of {{UUID}} is not in {file.name}. Add it there, or delete that file."
    refuse(absent, lambda row: f"{folder / 'image_class_labels.txt'}, row {row['row']}", message)
    tree = tree.join(names, on="class_id", how="left", maintain_order="left")
    text = {"node": pl.col("class_id").cast(pl.String), "parent": pl.col("parent_id").cast(pl.String)}
    return tree.select(**text, name="name")
