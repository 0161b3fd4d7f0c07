"""Packs a prepared folder: all images of a split, decoded, in one file, which training only has to copy from."""

import contextlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl

from vit_nabirds.data.images import PACK_FILES, PACK_INDEX
from vit_nabirds.data.photographs import Photographs, open_split
from vit_nabirds.data.table import PREPARED, read_prepared, read_table
from vit_nabirds.errors import UserError, remedy_of
from vit_nabirds.files import written_whole
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.parallel.locks import lock
from vit_nabirds.terminal import progress

SPLIT = {True: "train", False: "test"}  # of a table without validation photographs


def pack(root: str | Path) -> None:
    """Write train.npy, test.npy and index.parquet to root/packed/, unless they are there and intact."""
    root, started = Path(root), time.perf_counter()
    folder, table = root / "packed", read_table(root)
    try:
        folder.mkdir(exist_ok=True)
        with lock(folder / "lock", f"another process packs {root} right now: wait for its end."):
            intact = (folder / PACK_INDEX).exists() and _is_intact(root, table)
            if not intact:
                _write_pack(root, table)
    except OSError as error:
        raise UserError(f"{folder}: {error}. {remedy_of(error)} and run the command again.") from error
    size = sum((folder / name).stat().st_size for name in PACK_FILES.values())
    train = table["is_training_img"].sum()
    outcome = "already there" if intact else f"written in {time.perf_counter() - started:.1f} s"
    print(f"packed: {train:,} train and {table.height - train:,} test images, {size / 1e6:,.1f} MB, {outcome}")


def discard(root: Path) -> None:
    """Delete the pack, its index first, and what a killed run left."""
    for name in (PACK_INDEX, *PACK_FILES.values()):
        for file in (root / "packed").glob(f"{name}*"):
            file.unlink(missing_ok=True)


def _is_intact(root: Path, table: pl.DataFrame) -> bool:
    """Whether every image of the pack is what was written; if not, a note says why."""
    try:
        for train, name in PACK_FILES.items():
            split = open_split(root, table, SPLIT[train])
            image = np.empty((split.size, split.size, 3), np.uint8)
            for index in progress(range(len(split)), len(split), "images", f"checking {name}"):
                split.read(index, image)
    except UserError as error:
        if isinstance(error.__context__, OSError) and not isinstance(error.__context__, FileNotFoundError):
            raise  # the pack may be good, but cannot be read now
        print(f"note: {str(error).partition(': delete ')[0]}; packing again")
        return False
    return True


def _write_pack(root: Path, table: pl.DataFrame) -> None:
    folder, crc32 = root / "packed", np.zeros(table.height, np.uint32)
    splits = {name: open_split(root, table, SPLIT[train], ignore_pack=True) for train, name in PACK_FILES.items()}
    discard(root)
    needed, free = sum(3 * split.size**2 * len(split) for split in splits.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: packing needs {needed:,} bytes, {free:,} are free. Make room, or leave out --pack.")
    for name, split in splits.items():
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(split), split.size, split.size, 3)}
        with _on_disk(folder / name) as opened:
            np.lib.format.write_array_header_1_0(opened, header)
            images = progress(_decoded(split), len(split), "images", f"writing {name}")
            for row, image in zip(split.rows, images, strict=True):
                crc32[row] = zlib.crc32(image)
                opened.write(image)
    index = table.select("path", "is_training_img").with_columns(crc32=crc32)
    with _on_disk(folder / PACK_INDEX) as opened:
        index.write_parquet(opened, metadata={PREPARED: read_prepared(root)})


def _decoded(split: Photographs) -> Iterator[np.ndarray]:
    """The images in order, uint8 (size, size, 3), decoded at most 64 per thread ahead."""
    ahead = 64 * cpu_share()

    def read(index: int) -> np.ndarray:
        split.read(index, image := np.empty((split.size, split.size, 3), np.uint8))
        return image

    with ThreadPoolExecutor(cpu_share()) as pool:
        for start in range(0, len(split), ahead):
            yield from pool.map(read, range(len(split))[start : start + ahead])


@contextlib.contextmanager
def _on_disk(file: Path) -> Iterator[IO[bytes]]:
    """What is written to becomes `file` once all of it is on the disk."""
    with written_whole(file) as partial, open(partial, "wb") as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())
