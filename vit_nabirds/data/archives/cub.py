"""CUB-200-2011: NABirds' text files with fractional boxes, without sizes, photographers and a tree."""

from pathlib import Path

import polars as pl

from vit_nabirds.data.archives import nabirds
from vit_nabirds.data.archives.listing import Listing
from vit_nabirds.data.archives.text_files import join_files

_FORMS = {name: form for name, form in nabirds.FORMS.items() if name not in ("sizes.txt", "photographers.txt")}
_FORMS["bounding_boxes.txt"] = _FORMS["bounding_boxes.txt"].replace("whole pixels", "pixels")


def read(folder: Path) -> Listing:
    """The photographs; 002.Parakeet_Auklet is the class "Parakeet Auklet"."""
    listing = join_files("CUB-200-2011", folder, _FORMS)
    name = pl.col("subcategory").str.replace(r"^\d+\.", "").str.replace_all("_", " ")
    listing.table = listing.table.with_columns(name)
    return listing


def is_cub(folder: Path) -> bool:
    """Whether the text files in a folder are CUB's: photographs are numbered, and two of NABirds' files are absent."""
    if any((folder / name).exists() for name in ("sizes.txt", "photographers.txt")):
        return False
    if not (folder / "images.txt").is_file():
        return False
    with open(folder / "images.txt", "rb") as images:
        return images.read(1024).lstrip(b"\xef\xbb\xbf \r\n").split(b" ")[0].isdigit()
