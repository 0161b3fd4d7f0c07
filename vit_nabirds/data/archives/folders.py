"""A folder for each class, below train/ and test/ or val/, or without splits."""

import collections
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives.listing import Listing
from vit_nabirds.data.archives.names import SPLITS
from vit_nabirds.errors import UserError, quoted

_MOST_FOLDERS, _MOST_FILES = 1_000_000, 20_000_000
_FORMS = "train/<class>/<photograph> and test/<class>/<photograph>"
_JUNK = {"Thumbs.db", "ehthumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "Icon\r", "README", "LICENSE", "COPYING"}
# Suffixes that nobody gives to photographs. All other files are read: a suffix does not say what is in them.
_OTHER = """
    txt csv tsv json jsonl ndjson yaml yml toml ini cfg md rst xml html htm css js log lst names doc docx xls xlsx odt
    ods pdf svg py pyc ipynb sh bat zip tar gz tgz bz2 xz zst 7z rar parquet feather arrow npy npz pkl pickle mat h5
    hdf5 db sqlite lmdb tfrecord tfrecords pt pth ckpt onnx safetensors mp4 mov avi mkv webm wmv mpg mp3 wav flac ogg
    xmp aae url lnk tmp part crdownload lock bak md5 sha1 sha256
""".split()


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, but for junk."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_junk(entry.name))


def split_folders(folder: Path) -> list[str]:
    """Those that are splits: they are called so, and have class folders themselves or no class beside them."""
    present = class_folders(folder)
    splits = [name for name in present if name.lower() in SPLITS]
    return splits if splits == present or any(class_folders(folder / name) for name in splits) else []


def read(folder: Path) -> Listing:
    """A row for each file in or below a class folder that its suffix does not exclude, in the order of their paths."""
    splits, (paths, folders, notes) = split_folders(folder), _walk(folder)
    level = 1 if splits else 0  # of the class in a path
    part = pl.col("source").str.split("/").list
    table = pl.DataFrame({"source": sorted(paths)}, schema={"source": pl.String}).with_columns(
        top=part.first(),
        subcategory=part.get(level, null_on_oob=True),
        depth=part.len().cast(pl.Int32) - level - 2,  # below the class folder
        suffix=pl.col("source").str.extract(r"\.([^./]+)$").str.to_lowercase(),
    )
    others = table.filter(pl.col("suffix").is_in(_OTHER))
    for suffix, count in others.group_by("suffix").len().rows():
        notes[f"files end in .{suffix} and were left out, as no photographs"] += count
    table = table.join(others, on="source", how="anti", maintain_order="left")
    split = pl.col("top").replace_strict({name: SPLITS[name.lower()] for name in splits}, default=None)
    table = table.with_columns(split=split.cast(pl.String) if splits else pl.lit(None, pl.String))
    labelled = (pl.col("depth") >= 0) & (pl.col("split").is_not_null() if splits else True)
    loose, table = table.filter(~labelled), table.filter(labelled)
    _refuse_misplaced(folder, splits, table, loose)
    notes["files lie outside of every class folder and were left out"] += loose.height
    notes["photographs lie in folders below their class's folder"] += table.filter(pl.col("depth") > 0).height
    holding = set(table["source"].str.extract(rf"^((?:[^/]+/){{{level}}}[^/]+)/").unique())
    classes = [name for name in folders if name.count("/") == level and (not splits or name.split("/")[0] in splits)]
    notes["class folders hold no photograph"] += len(set(classes) - holding)
    return Listing(
        kind="a folder for each class",
        folder=folder,
        table=table,
        where=lambda row, what: str(folder / row["source"]),
        split_place=folder,
        split_remedy=". Add a folder {split}/ with a folder for each class",
        notes=notes,
    )


def _refuse_misplaced(folder: Path, splits: list[str], table: pl.DataFrame, loose: pl.DataFrame) -> None:
    """Raise UserError where the folders are there, but not in the form of a layout."""
    present, deep = set(table["split"]), table.filter(pl.col("depth") > 0)
    missing = {"train"} - present | ({"test", "val"} if present <= {"train"} else set())
    for name in splits:
        count = loose.filter(pl.col("top") == name).height
        if SPLITS[name.lower()] in missing and count:
            raise UserError(
                f"{folder / name}: {count:,} files in it, but no class folders: a photograph's folder is its class. "
                f"Sort them into a folder for each class, or move {name} away and give --test_share=0.2."
            )
    if table.is_empty():
        raise UserError(f"{folder}: no photograph in a folder of its class. Make it <class>/<photograph> or {_FORMS}.")
    within = set(deep["source"].str.split("/").list.get(1).str.to_lowercase())
    if not splits and "train" in within and within <= SPLITS.keys():
        raise UserError(
            f"{folder}: splits in class folders, as {quoted(deep['source'][0])}. Make it <split>/<class>/<photograph>."
        )


def _walk(root: Path) -> tuple[list[str], list[str], collections.Counter]:
    """The files and folders below a folder, relative to it, through links too; and what was not followed."""
    files, folders, broken, notes = [], [], [], collections.Counter()
    waiting = [("", (_identity(root),))]  # with the identities of a folder and those above it
    while waiting:
        folder, above = waiting.pop()
        if len(folders) > _MOST_FOLDERS or len(files) > _MOST_FILES:  # two links in each of forty are a trillion ways
            raise UserError(
                f"{root}: more than {_MOST_FOLDERS:,} folders or {_MOST_FILES:,} files in it. Remove the links that "
                "lead from folder to folder."
            )
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise UserError(
                f"{quoted(root / folder, 1000)}: {error.strerror}. Make it readable, or move it away."
            ) from None
        for entry in entries:
            name = folder + entry.name
            if _is_junk(entry.name):
                continue
            if not _is_text(entry.name):
                broken.append(name)
            elif _is(entry.is_file):
                files.append(name)
            elif not _is(entry.is_dir):
                notes["links that lead nowhere, pipes and the like were left out"] += 1
            elif (identity := _identity(root / name)) in above:
                notes["links lead back to a folder above them and were not followed"] += 1
            else:
                folders.append(name)
                waiting.append((name + "/", (*above, identity)))
    if broken:
        raise UserError(
            f"{root}: {len(broken):,} names in it are not UTF-8, as {os.fsencode(sorted(broken)[0])}. Rename them, "
            "as `convmv -r -f latin1 -t utf8 --notest FOLDER` does with names in Latin-1."
        )
    return files, folders, notes


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in _JUNK


def _is(kind: Callable[[], bool]) -> bool:
    """What a directory entry says of itself; a link to itself is nothing."""
    try:
        return kind()
    except OSError:
        return False


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
