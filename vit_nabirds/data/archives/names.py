"""Names of classes and splits as people write them, and as the rest of the program sees them."""

import re

import polars as pl

# What folders, files and columns call a split.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(["val", "valid", "validation", "dev"], "val")


def clean_name(name: pl.Expr) -> pl.Expr:
    """The text in NFC, with white space of any kind as single spaces, and without what nobody sees (control and
    zero-width characters). The same for a name and its clean name."""
    visible = name.str.replace_all(r"\s", " ").str.replace_all(r"[\p{Cc}\p{Default_Ignorable_Code_Point}]", "")
    return visible.str.replace_all(" +", " ").str.strip_chars(" ").str.normalize("NFC")


def species_of(name: pl.Expr) -> pl.Expr:
    """A clean class name without the plumage at its end: "Teal  (Adult )" becomes "Teal"."""
    return clean_name(name).str.replace(r" ?\([^()]*\)$", "")


def split_of(name: str) -> str | None:
    """The split that a file's or folder's name tells, as instances_val2017.json does; None if it tells none or two."""
    splits = {SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS}
    return splits.pop() if len(splits) == 1 else None
