"""The images of a prepared folder, from its image files or from its pack."""

import dataclasses
import os
import re
import stat
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import simplejpeg

from vit_nabirds.data.foreign import check_storage, leads_out, read_parquet
from vit_nabirds.data.kinds import JPEG
from vit_nabirds.data.pictures import open_picture
from vit_nabirds.data.table import PARQUET_ERRORS, PREPARED, read_prepared, settings_of
from vit_nabirds.errors import UserError, quoted

# The files in packed/. The index is written last: a pack with an index is complete.
PACK_INDEX, PACK_FILES = "index.parquet", {True: "train.npy", False: "test.npy"}
# What NumPy writes before such images. Its own reader would evaluate a stranger's header as Python.
PACK_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \(([0-9]{1,9}), ([0-9]{1,5}), ([0-9]{1,5}), 3\), \} *\n",
    re.DOTALL,
)
PACK_COLUMNS = {"path": pl.String, "is_training_img": pl.Boolean, "crc32": pl.UInt32}


MAX_SIDE = 2**14  # of a prepared image in pixels


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The training or the test images, each a file of `size` x `size` pixels."""

    folder: Path
    paths: pl.Series  # a Python list of millions of them would take several times their bytes
    size: int
    crc32: np.ndarray | None  # of each file; None in the course's folder

    def read(self, index: int, out: np.ndarray) -> None:
        """Decode an image into `out`, uint8 (size, size, 3). UserError if it is not the one that was prepared."""
        file = self.folder / self.paths[int(index)]
        try:
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                raise ValueError("it is no regular file")
            if leads_out(self.folder, self.paths[int(index)]):
                raise UserError(
                    f"{file} leads out of {self.folder} through a link: copy the photographs there (cp -rL), or link "
                    "the whole folder."
                )
            if status.st_size > 2**16 + 16 * out.size:
                raise ValueError(f"it has {status.st_size:,} bytes, too many for {self.size} x {self.size} pixels")
            data = file.read_bytes()
            if self.crc32 is not None and zlib.crc32(data) != self.crc32[index]:
                raise ValueError("it is not what `prepare` wrote")
            if data.startswith(JPEG) and simplejpeg.decode_jpeg_header(data)[:2] == out.shape[:2]:
                # Strict: a truncated file is an error, not a picture that is grey at the bottom.
                simplejpeg.decode_jpeg(data, strict=True, buffer=out)
                return
            image = open_picture(data).read()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else quoted(error)
            check_storage(file, error)
            raise UserError(
                f"{quoted(file, 1000)} cannot be read ({reason}): run `main.py prepare` again to mend it."
            ) from None
        if image.shape != out.shape:
            raise UserError(
                f"{quoted(file, 1000)} is {image.shape[:2]} px, unlike the other images of its split ({self.size} x "
                f"{self.size}): prepare the folder again."
            )
        out[:] = image


class PackedImages:
    """The same images in one .npy file, uint8 (n, size, size, 3). The first read of each checks its crc32.

    The file is read, not mapped: on a mapped file a failing disk is a SIGBUS, not an exception. Each process opens it.
    """

    def __init__(self, file: Path, paths: pl.Series, crc32: np.ndarray):
        self.file, self.folder, self.paths, self.crc32 = file, file.parent, paths, crc32
        self.checked = np.zeros(len(paths), bool)
        try:
            # Without waiting for the other end of a pipe.
            self.opened = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
            header = PACK_HEADER.match(self.opened.read(256) or b"")
            if not header:
                raise ValueError("its header is not that of a pack")
            count, self.size, width = map(int, header.groups())
            if (count, self.size) != (len(paths), width):
                raise ValueError(f"it holds {count} images of {self.size} x {width}, not {len(paths)} square ones")
            self.offset, length = header.end(), os.fstat(self.opened.fileno()).st_size
            self.image_bytes = 3 * self.size**2
            if length != (expected := self.offset + len(paths) * self.image_bytes):
                raise ValueError(f"it has {length} bytes, not {expected}")
        except (OSError, ValueError) as error:
            check_storage(file, error)
            raise _pack_error(file, f"cannot be read ({error})") from None

    def __reduce__(self):
        return PackedImages, (self.file, self.paths, self.crc32)

    def read(self, index: int, out: np.ndarray) -> None:
        """Copy an image into `out`, uint8 (size, size, 3)."""
        try:
            count = os.preadv(self.opened.fileno(), [out], self.offset + int(index) * self.image_bytes)
        except OSError as error:
            check_storage(self.file, error)
            raise _pack_error(self.file, f"cannot be read ({error})") from None
        if count != self.image_bytes:
            raise _pack_error(self.file, f"ends inside the image of {quoted(self.paths[int(index)])}")
        if not self.checked[index]:
            if zlib.crc32(out) != self.crc32[index]:
                path = quoted(self.paths[int(index)])
                raise _pack_error(self.file, f"is damaged: the image of {path} is not what was written")
            self.checked[index] = True


def open_images(root: Path, table: pl.DataFrame, train: bool, ignore_pack: bool = False) -> ImageFiles | PackedImages:
    """All training images (of which some may be held out) or all test images of a table from `read_table`.

    From the folder's pack, or else from its image files, which are not opened. UserError if they do not match.
    """
    table = table.filter(pl.col("is_training_img") == train)
    folder = root / "packed"
    file = folder / PACK_INDEX
    if ignore_pack or not file.exists():
        return _open_files(root, table, train)
    try:
        index, metadata = read_parquet(file, schema=PACK_COLUMNS), pl.read_parquet_metadata(file)
    except PARQUET_ERRORS as error:
        check_storage(file, error)
        raise _pack_error(
            file, f"is not a readable Parquet file with {', '.join(PACK_COLUMNS)} ({quoted(error)})"
        ) from None
    index = index.filter(pl.col("is_training_img") == train)
    if not index["path"].equals(table["path"]):
        raise _pack_error(file, f"does not list the {'training' if train else 'test'} images of metadata.parquet")
    if metadata.get(PREPARED) != read_prepared(root):
        raise _pack_error(file, f"is of images made with other settings than those in {root / PREPARED}")
    return PackedImages(folder / PACK_FILES[train], table["path"], index["crc32"].to_numpy())


def _open_files(root: Path, table: pl.DataFrame, train: bool) -> ImageFiles:
    folder, setting = root / "cleaned_images", "train_size" if train else "test_size"
    size = settings_of(root).get(setting)
    if size is None:  # the course's folder: its first image has the size of all
        file = folder / table["path"][0]
        try:
            if leads_out(folder, table["path"][0]) or not file.is_file():  # a pipe would be waited for
                raise ValueError(f"it is no regular file in {folder}")
            width, height = open_picture(file).size
        except (OSError, ValueError) as error:
            check_storage(file, error)
            raise UserError(
                f"{quoted(file, 1000)} cannot be read ({quoted(error)}): prepare the folder again."
            ) from None
        if width != height:
            raise UserError(
                f"{quoted(file, 1000)} is {width} x {height} px: prepared images are square; run `main.py prepare`."
            )
        size = width
    if type(size) is not int or not 1 <= size <= MAX_SIDE:
        raise UserError(f"{root / PREPARED} has {setting} {quoted(size)}: prepare the folder again.")
    crc32 = table["crc32"].to_numpy() if "crc32" in table.columns else None
    return ImageFiles(folder, table["path"], size, crc32)


def _pack_error(file: Path, problem: str) -> UserError:
    return UserError(f"{file} {problem}: delete {file.parent} and run `main.py prepare --pack` again.")
