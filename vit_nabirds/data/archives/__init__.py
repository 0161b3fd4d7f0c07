"""Labelled photographs in the layouts that people have, as one table.

A layout is recognised by what is there. `nabirds`, `cub`, `folders`, `tables` and `coco` each read one; `listing` holds
the checks that they share.
"""

import dataclasses
import os
import re
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives import coco, cub, folders, nabirds, tables
from vit_nabirds.data.archives.listing import Listing, complete
from vit_nabirds.data.archives.names import split_of
from vit_nabirds.errors import ConfigError, UserError, quoted

_LAYOUTS = (
    "An archive is NABirds or CUB-200-2011 (with images.txt), a folder for each class (train/<class>/<photograph> and "
    "test/<class>/<photograph>, or <class>/<photograph>), a table (CSV or Parquet with columns path and label), or "
    "JSON in COCO's form"
)
# ZIP, 7z, RAR, and tar or what it is compressed with
_PACKED = re.compile(
    rb"PK(\x03\x04|\x05\x06)|7z\xbc\xaf|Rar!|\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """Labelled photographs. `table` has a row for each training example, in the archive's order, with at least

    path (of the prepared image, relative and unique), source (of the photograph, relative to `folder`), subcategory
    (the class), species_name (the class without plumage in NABirds, else the same), node (of the class in `taxonomy`),
    photographer, is_training_img, bb_x, bb_y, bb_width, bb_height (pixels, Float64; null: the whole photograph), width
    and height (the size that the box refers to). Null is unknown.
    """

    kind: str  # the layout, for the user
    folder: Path
    table: pl.DataFrame
    notes: dict[str, int]  # what a summary should count, as {"boxes stuck out of their image and were clamped": 201}
    taxonomy: pl.DataFrame | None  # node, parent (null at the root) and name, if the archive has a tree of classes


def read_archive(path: str | Path, crop: str = "box", test_share: float | None = None) -> Archive:
    """The archive in a folder or file; no photograph is opened. crop="none" leaves the boxes out, and `test_share` is
    the share of each species to hold out of an archive without a test split.

    Raises UserError with file and row if it has no known layout, is malformed or contradicts itself.
    """
    if crop not in ("box", "none"):
        raise ConfigError(f"crop is {crop!r}: give box (each box) or none (whole photographs).")
    if test_share is not None and not 0 < test_share < 1:
        raise ConfigError(f"test_share is {test_share}: give a share of the photographs between 0 and 1, as 0.2.")
    try:
        listing = _recognise(Path(path), crop)
        table = complete(listing, crop, test_share)
    except OSError as error:
        raise UserError(
            f"{quoted(error.filename or path, 1000)}: {error.strerror or error}. Make it readable."
        ) from error
    except RecursionError:
        raise UserError(f"{path}: folders in folders, too deep to look into. Name the one with the archive.") from None
    except UserError as error:  # names of folders and files in an archive are foreign text as well
        raise type(error)(quoted(error, 2000)) from error
    notes = {note: count for note, count in listing.notes.items() if count}
    return Archive(listing.kind, listing.folder, table, notes, listing.taxonomy)


def _recognise(path: Path, crop: str) -> Listing:
    if path.is_dir():
        return _read_folder(path, crop)
    if not path.is_file():
        raise UserError(f"{path}: no such folder or file. Name the unpacked archive. {_LAYOUTS}.")
    with open(path, "rb") as opened:
        start = opened.read(512)
    if _PACKED.match(start):
        raise UserError(f"{path}: a packed file. Unpack it and name the folder; save a spreadsheet as CSV.")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        return coco.read({path: None}, path.parent)
    return tables.read({path: None}, path.parent, crop)


def _read_folder(path: Path, crop: str) -> Listing:
    """What is in a folder, or in the only folder in it: an archive is often unpacked into one."""
    if (path / "prepared.json").is_file():
        raise UserError(f"{path}: a folder that `prepare` has written. Name the archive that it was made from.")
    if _has_texts(path):
        return cub.read(path) if cub.is_cub(path) else nabirds.read(path)
    inner, splits, labels = folders.class_folders(path), folders.split_folders(path), _label_files(path)
    if labels and any(folders.class_folders(path / name) for name in splits):
        raise UserError(
            f"{path}: {min(labels).name} and {splits[0]}/ could both say the classes. Name the file itself, or move it "
            "away."
        )
    if labels:
        return coco.read(labels, path) if min(labels).suffix.lower() == ".json" else tables.read(labels, path, crop)
    wrapped = [path / name for name in inner if _has_texts(path / name)]
    if not wrapped and len(inner) == 1 and not splits:
        wrapped = [path / inner[0]] * bool(folders.class_folders(path / inner[0]) or _label_files(path / inner[0]))
    if len(wrapped) == 1:
        return _read_folder(wrapped[0], crop)
    if len(inner) < 2 and (others := _files(path, tables.SUFFIXES)):
        return tables.read({others[0]: None}, path, crop)  # says what is wrong with it
    if not inner:
        found = "nothing in it that is known as an archive"
        if not any(path.iterdir()):
            found = "an empty folder"
        elif any(file.suffix.lower() in (".jpg", ".jpeg", ".png") for file in path.iterdir()):
            found = "photographs lie directly in it, and the folder of a photograph is its class: give the folder "
            found += "above, or make folders of classes"
        raise UserError(f"{path}: {found}. {_LAYOUTS}.")
    return folders.read(path)


def _has_texts(folder: Path) -> bool:
    return sum((folder / name).is_file() for name in nabirds.FORMS) > 2


def _label_files(folder: Path) -> dict[Path, str | None]:
    """The tables, or the COCO files, also in annotations/ and the splits' folders; if there are several, with the split
    that the name of each tells."""
    places = [folder, folder / "annotations", *(folder / name for name in folders.split_folders(folder))]
    found = [file for place in places for file in _files(place, tables.SUFFIXES) if tables.fits(file)]
    jsons = [file for place in places for file in _files(place, (".json",)) if coco.fits(file)]
    found += jsons
    splits = {file: split_of(str(file.relative_to(folder))) if len(found) > 1 else None for file in found}
    told = set(splits.values())
    if len(found) > 1 and (None in told or len(told) < len(found) or 0 < len(jsons) < len(found)):
        raise UserError(
            f"{folder}: {quoted(', '.join(file.name for file in found))} could all hold the labels. Name one, or leave "
            "one for each split there, with train, val or test in its name."
        )
    return splits


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with these suffixes in a folder, if it is there."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    files = [folder / name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return [file for file in files if file.is_file()]
