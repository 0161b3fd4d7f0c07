"""A prepared folder's images -> one file for each split, read without decoding."""

import concurrent.futures
import io
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
from tqdm import tqdm

from vit_nabirds.data import batches as data
from vit_nabirds.data import images
from vit_nabirds.parallel import locks
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.errors import UserError, remedy_of

_TEMPORARY, _CHECKSUMS = ".tmp", ".crc32"


def pack(out: str | Path) -> None:
    """Writes out/packed/ with train.npy, test.npy and, last, index.parquet; goes on with what a killed run left."""
    out, started = Path(out), time.perf_counter()
    folder, table = out / "packed", data.read_table(out)
    try:
        folder.mkdir(exist_ok=True)
        with locks.lock(folder / "lock", f"another process packs {out} right now: wait for its end."):
            complete = _is_complete(out, table)
            splits = {train: data.open_split(out, table, train) for train in (True, False)}
            if not complete:
                _write_all(folder, table, splits)
    except OSError as error:
        raise UserError(
            f"{folder}: {error}. {remedy_of(error)} and run the command again; it goes on from there."
        ) from error
    size = sum((folder / name).stat().st_size for name in images.PACK_FILES.values())
    how = "already there" if complete else f"written in {time.perf_counter() - started:.1f} s"
    print(f"packed: {len(splits[True]):,} train and {len(splits[False]):,} test images, {size / 1e6:,.1f} MB, {how}")


def discard(out: Path) -> None:
    """Removes what was packed; the index last, or a kill on the way would leave what seems to be begun and good."""
    for name in (*images.PACK_FILES.values(), images.PACK_INDEX):
        for ending in (_TEMPORARY, _CHECKSUMS, ""):
            (out / "packed" / (name + ending)).unlink(missing_ok=True)


def _is_complete(out: Path, table: pl.DataFrame) -> bool:
    """Whether there is a pack, and each image in it is what was written; one that is not is told of and discarded."""
    if not (out / "packed" / images.PACK_INDEX).exists():
        return False
    try:
        for train in (True, False):
            split = data.open_split(out, table, train)
            for index in tqdm(range(len(split)), desc=f"checking {images.PACK_FILES[train]}", disable=None):
                split[index]
        return True
    except UserError as error:
        if isinstance(error.__context__, OSError) and not isinstance(error.__context__, FileNotFoundError):
            raise  # it may be good, and cannot be read
        for train in (True, False):  # raises where no other pack could be made
            images.open_files(out / "cleaned_images", table.filter(is_training_img=train)["path"].to_list())
        print(f"note: {str(error).partition(': delete ')[0]}; it is packed anew")
        discard(out)
        return False


def _write_all(folder: Path, table: pl.DataFrame, splits: dict[bool, data.Photographs]) -> None:
    crc32 = np.zeros(table.height, np.uint32)
    _check_space(folder, splits)
    for train, split in splits.items():
        crc32[split.rows] = _write_split(split, folder / images.PACK_FILES[train])
    index = table.select("path", "is_training_img").with_columns(crc32=crc32)
    temporary = folder / (images.PACK_INDEX + _TEMPORARY)
    with open(temporary, "wb") as opened:
        index.write_parquet(opened, metadata={images.PREPARED: images.read_prepared(folder.parent)})
        _flush(opened)
    os.replace(temporary, folder / images.PACK_INDEX)
    for name in images.PACK_FILES.values():
        (folder / (name + _CHECKSUMS)).unlink()


def _check_space(folder: Path, splits: dict[bool, data.Photographs]) -> None:
    needed = sum(len(split) * _image_bytes(split) for split in splits.values())
    needed -= sum(file.stat().st_size for file in folder.glob("*.npy*"))
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder}: the packed images need {needed / 1e6:,.1f} MB more, and {free / 1e6:,.1f} MB are free. Make "
            "room, or leave out --pack."
        )


def _write_split(split: data.Photographs, file: Path) -> list[int]:
    """Writes or completes the file; the crc32 of each image."""
    header, image_bytes = _header(split), _image_bytes(split)
    temporary, checksums = (file.with_name(file.name + ending) for ending in (_TEMPORARY, _CHECKSUMS))
    if file.exists():  # of a run that was killed before its end: to be looked through, as a part of one is
        os.replace(file, temporary)
    with open(temporary, "a+b") as opened, open(checksums, "a+b", buffering=0) as beside:
        crc32 = _intact(opened, beside, header, image_bytes, len(split))
        opened.truncate(len(header) + len(crc32) * image_bytes)
        beside.truncate(4 * len(crc32))
        with tqdm(total=len(split), initial=len(crc32), desc=file.name, unit=" images", disable=None) as progress:
            for image in _decoded(split, len(crc32)):
                crc32.append(zlib.crc32(image))
                opened.write(image)
                beside.write(struct.pack("<I", crc32[-1]))
                progress.update()
        _flush(opened)
    os.replace(temporary, file)
    return crc32


def _intact(opened: IO[bytes], beside: IO[bytes], header: bytes, image_bytes: int, most: int) -> list[int]:
    """The crc32 of what a killed run wrote, up to the first image that is not what it said it had written."""
    opened.seek(0)
    if opened.read(len(header)) != header:
        opened.truncate(0)
        opened.write(header)
        return []
    beside.seek(0)
    crc32, told = [], beside.read()
    for (expected,) in struct.iter_unpack("<I", told[: min(len(told) // 4, most) * 4]):
        if zlib.crc32(opened.read(image_bytes)) != expected:
            break
        crc32.append(expected)
    return crc32


def _decoded(split: data.Photographs, start: int) -> Iterator[np.ndarray]:
    """The images from `start` on in order, uint8 (size, size, 3); each thread is at most 64 of them ahead."""
    pool = concurrent.futures.ThreadPoolExecutor(cpu_share())
    try:
        for first in range(start, len(split), chunk := 64 * cpu_share()):
            indices = range(first, min(first + chunk, len(split)))
            yield from pool.map(lambda index: split[index]["image"], indices)
    finally:
        pool.shutdown(cancel_futures=True)


def _header(split: data.Photographs) -> bytes:
    shape = (len(split), split.size, split.size, 3)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _image_bytes(split: data.Photographs) -> int:
    return 3 * split.size**2


def _flush(opened: IO[bytes]) -> None:
    """Down to the disk, so that a file has its name only when it is there as a whole."""
    opened.flush()
    os.fsync(opened.fileno())
