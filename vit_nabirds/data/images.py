"""The images of a prepared folder, from its image files or from its pack."""

import concurrent.futures
import dataclasses
import io
import os
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vit_nabirds.data.table import PARQUET_ERRORS, PREPARED, read_prepared
from vit_nabirds.errors import UserError
from vit_nabirds.parallel.cpus import cpu_share

# The files in packed/. The index is written last: a pack with an index is complete.
PACK_INDEX, PACK_FILES = "index.parquet", {True: "train.npy", False: "test.npy"}
PACK_COLUMNS = {"path": pl.String, "is_training_img": pl.Boolean, "crc32": pl.UInt32}

JPEG = b"\xff\xd8"  # its first bytes
# Formats that Pillow decodes by itself. It would hand PostScript to Ghostscript, whatever the file's name.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def open_picture(source: str | Path | IO[bytes]) -> Image.Image:
    """A picture, not decoded yet. Raises ValueError if it has none of FORMATS, OSError if it cannot be read."""
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None


def to_rgb(picture: Image.Image) -> np.ndarray:
    """Its pixels, uint8 (height, width, 3), without alpha. Raises ValueError for more than 8 bits a channel."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a pixel, convert it to 8")
    return np.asarray(picture.convert("RGB"))


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The images of a split, each a file of `size` x `size` pixels."""

    folder: Path
    paths: list[str]
    size: int

    def read(self, index: int, out: np.ndarray) -> None:
        """Decode an image into `out`, uint8 (size, size, 3)."""
        file = self.folder / self.paths[index]
        try:
            data = file.read_bytes()
            is_jpeg = data.startswith(JPEG)
            image = None if is_jpeg else to_rgb(open_picture(io.BytesIO(data)))
            shape = simplejpeg.decode_jpeg_header(data)[:2] if is_jpeg else image.shape[:2]
            if shape != out.shape[:2]:
                raise UserError(
                    f"{file} is {shape} px, unlike the other images of its split ({self.size} x {self.size}): prepare "
                    "the folder again."
                )
            if is_jpeg:
                # Strict: a truncated file is an error, not a picture that is grey at the bottom.
                simplejpeg.decode_jpeg(data, strict=True, buffer=out)
            else:
                out[:] = image
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): delete it and run `main.py prepare` again.") from None


class PackedImages:
    """The images of a split in one .npy file, uint8 (n, size, size, 3). The first read of each checks its crc32.

    The file is read, not mapped: on a mapped file a failing disk is a SIGBUS, not an exception. Each process opens it.
    """

    def __init__(self, file: Path, paths: list[str], crc32: np.ndarray):
        self.file, self.folder, self.paths, self.crc32 = file, file.parent, paths, crc32
        self.checked = np.zeros(len(paths), bool)
        try:
            self.opened = open(file, "rb", buffering=0)
            np.lib.format.read_magic(self.opened)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.opened)
            self.offset, self.size, length = self.opened.tell(), shape[1], os.fstat(self.opened.fileno()).st_size
            self.image_bytes = 3 * self.size**2
            if dtype != np.uint8 or fortran_order or shape != (len(paths), self.size, self.size, 3):
                raise ValueError(f"it holds {dtype} {shape}, not {len(paths)} square images of uint8")
            if length != (expected := self.offset + len(paths) * self.image_bytes):
                raise ValueError(f"it has {length} bytes, not {expected}")
        except Exception as error:  # NumPy evaluates the header, and a damaged one raises anything
            raise _pack_error(file, f"cannot be read ({error})") from None

    def __reduce__(self):
        return PackedImages, (self.file, self.paths, self.crc32)

    def read(self, index: int, out: np.ndarray) -> None:
        """Copy an image into `out`, uint8 (size, size, 3)."""
        try:
            count = os.preadv(self.opened.fileno(), [out], self.offset + int(index) * self.image_bytes)
        except OSError as error:
            raise _pack_error(self.file, f"cannot be read ({error})") from None
        if count != self.image_bytes:
            raise _pack_error(self.file, f"ends inside the image of {self.paths[index]}")
        if not self.checked[index]:
            if zlib.crc32(out) != self.crc32[index]:
                raise _pack_error(self.file, f"is damaged: the image of {self.paths[index]} is not what was written")
            self.checked[index] = True


def open_images(root: Path, paths: list[str], train: bool, ignore_pack: bool = False) -> ImageFiles | PackedImages:
    """The images of `paths` from the folder's pack, or else from its image files. UserError if they do not match."""
    folder = root / "packed"
    file = folder / PACK_INDEX
    if ignore_pack or not file.exists():
        return open_files(root / "cleaned_images", paths)
    try:
        index, metadata = pl.read_parquet(file, schema=PACK_COLUMNS), pl.read_parquet_metadata(file)
    except PARQUET_ERRORS as error:
        raise _pack_error(file, f"is not a readable Parquet file with {', '.join(PACK_COLUMNS)} ({error})") from None
    index = index.filter(pl.col("is_training_img") == train)
    if index["path"].to_list() != paths:
        raise _pack_error(file, f"does not list the {'training' if train else 'test'} images of metadata.parquet")
    if metadata.get(PREPARED) != read_prepared(root):
        raise _pack_error(file, f"is of images made with other settings than those in {root / PREPARED}")
    return PackedImages(folder / PACK_FILES[train], paths, index["crc32"].to_numpy())


def open_files(folder: Path, paths: list[str]) -> ImageFiles:
    """The image files, after a look at the start and end of each."""
    with concurrent.futures.ThreadPoolExecutor(4 * cpu_share()) as pool:
        sizes = list(pool.map(lambda path: _size(folder / path), paths))
    wrong = [(path, size) for path, size in zip(paths, sizes, strict=True) if isinstance(size, str) or size != sizes[0]]
    if wrong:
        path, size = wrong[0]
        problem = size if isinstance(size, str) else f"is {size} px, but {paths[0]} is {sizes[0]} px"
        raise UserError(
            f"{folder / path} {problem} ({len(wrong)} of {len(paths)} images are wrong): delete the damaged ones and "
            "run `main.py prepare` again."
        )
    height, width = sizes[0]
    if height != width:
        raise UserError(f"{folder / paths[0]} is {sizes[0]} px: prepared images are square; run `main.py prepare`.")
    return ImageFiles(folder, paths, height)


def _size(file: Path) -> tuple[int, int] | str:
    """(height, width) from the start of the file, or what is wrong with it."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(4096)  # a prepared image has its size in the first kilobyte
            if not start.startswith(JPEG):
                with open_picture(file) as picture:
                    return picture.size[::-1]
            opened.seek(-2, os.SEEK_END)
            if opened.read() != b"\xff\xd9":
                return "is a truncated JPEG"
            return simplejpeg.decode_jpeg_header(start)[:2]
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


def _pack_error(file: Path, problem: str) -> UserError:
    return UserError(f"{file} {problem}: delete {file.parent} and run `main.py prepare --pack` again.")
