"""The images of a split: files, or a pack of them. Free of JAX, for worker processes import it."""

import concurrent.futures
import dataclasses
import io
import os
import zlib
from pathlib import Path
from typing import IO

import imageio.v3 as iio
import numpy as np
import polars as pl
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.errors import UserError

# In the folder packed/: where the index lies, the pack is complete.
PACK_INDEX, PACK_FILES = "index.parquet", {True: "train.npy", False: "test.npy"}
PREPARED = "prepared.json"  # of a prepared folder: how its images were made; a copy of its text is in the index
PACK_COLUMNS = {"path": pl.String, "is_training_img": pl.Boolean, "crc32": pl.UInt32}

# Readers that decode by themselves. Left to choose, Pillow hands PostScript to Ghostscript, whatever the file's name.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def open_picture(source: str | Path | IO[bytes]) -> Image.Image:
    """A picture of one of FORMATS, not decoded yet; ValueError for anything else, OSError if it cannot be read."""
    try:
        return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The images of a split, each a file of `size` x `size` pixels: JPEG, or whatever imageio reads."""

    folder: Path
    paths: list[str]
    size: int

    def read(self, index: int, out: np.ndarray) -> None:
        """Writes the image into `out`, uint8 (size, size, 3)."""
        file = self.folder / self.paths[index]
        try:
            data = file.read_bytes()
            is_jpeg = data[:2] == b"\xff\xd8"
            image = None if is_jpeg else decode(data)[..., :3]
            shape = (*simplejpeg.decode_jpeg_header(data)[:2], 3) if is_jpeg else image.shape
            if shape != out.shape:
                raise UserError(
                    f"{file} is {shape}, unlike the other images of its split ({self.size} x {self.size}): prepare the "
                    "folder again."
                )
            if is_jpeg:
                # strict: a truncated file is an error, not a picture that is grey at the bottom
                simplejpeg.decode_jpeg(data, strict=True, buffer=out)
            else:
                out[:] = image
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): delete it and run `main.py prepare` again.") from None


class PackedImages:
    """The images of a split in one .npy file, uint8 (n, size, size, 3); their crc32 is compared at the first reading.

    Read, not mapped: on a mapped file, a failing disk is a SIGBUS and no error. Each process opens it for itself.
    """

    def __init__(self, file: Path, paths: list[str], crc32: np.ndarray):
        self.file, self.folder, self.paths, self.crc32 = file, file.parent, paths, crc32
        self.checked = np.zeros(len(paths), bool)
        try:
            self.opened = open(file, "rb", buffering=0)
            shape, self.offset = read_npy_header(self.opened)
            length = os.fstat(self.opened.fileno()).st_size
        except Exception as error:  # NumPy evaluates the header, and a damaged one raises anything
            raise pack_error(file, f"cannot be read ({error})") from None
        self.size = shape[1]
        self.image_bytes = 3 * self.size**2
        if shape[0] != len(paths):
            raise pack_error(file, f"holds {shape[0]} images, not {len(paths)}")
        if length != self.offset + shape[0] * self.image_bytes:
            raise pack_error(file, f"has {length} bytes, not {self.offset + shape[0] * self.image_bytes}")

    def __reduce__(self):
        return PackedImages, (self.file, self.paths, self.crc32)

    def read(self, index: int, out: np.ndarray) -> None:
        """Writes the image into `out`, uint8 (size, size, 3)."""
        try:
            count = os.preadv(self.opened.fileno(), [out], self.offset + int(index) * self.image_bytes)
        except OSError as error:
            raise pack_error(self.file, f"cannot be read ({error})") from None
        if count != self.image_bytes:
            raise pack_error(self.file, f"ends inside the image of {self.paths[index]}")
        if not self.checked[index]:
            if zlib.crc32(out) != self.crc32[index]:
                raise pack_error(self.file, f"is damaged: the image of {self.paths[index]} is not what was written")
            self.checked[index] = True


def open_images(root: Path, paths: list[str], train: bool) -> ImageFiles | PackedImages:
    """Those of a prepared folder's pack where it has one, else its image files; UserError when they are not `paths`."""
    if (root / "packed" / PACK_INDEX).exists():
        return _open_pack(root / "packed", paths, train)
    return open_files(root / "cleaned_images", paths)


def open_files(folder: Path, paths: list[str]) -> ImageFiles:
    """The images, after a look at the head and tail of every file."""
    with concurrent.futures.ThreadPoolExecutor(4 * cpu_share()) as pool:
        sizes = list(pool.map(lambda path: _size(folder / path), paths))
    wrong = [(path, size) for path, size in zip(paths, sizes, strict=True) if isinstance(size, str) or size != sizes[0]]
    if wrong:
        path, size = wrong[0]
        what = size if isinstance(size, str) else f"is {size} px, but {paths[0]} is {sizes[0]} px"
        raise UserError(
            f"{folder / path} {what} ({len(wrong)} such of {len(paths)}): delete what is damaged and run "
            "`main.py prepare` again."
        )
    if sizes[0][0] != sizes[0][1]:
        raise UserError(f"{folder / paths[0]} is {sizes[0]} px: prepared images are square; run `main.py prepare`.")
    return ImageFiles(folder, paths, sizes[0][0])


def decode(data: bytes) -> np.ndarray:
    """The pixels of a file that is not JPEG, uint8 (height, width, channels)."""
    open_picture(io.BytesIO(data)).close()
    return iio.imread(data, plugin="pillow")


def _open_pack(folder: Path, paths: list[str], train: bool) -> PackedImages:
    """The images, when the pack holds those of `paths` in that order."""
    file = folder / PACK_INDEX
    try:  # damaged bytes make polars panic, too
        index, about = pl.read_parquet(file), pl.read_parquet_metadata(file)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise pack_error(file, f"is not a readable Parquet file ({error})") from None
    if index.schema != PACK_COLUMNS:
        raise pack_error(file, f"has the columns {dict(index.schema)}, not {', '.join(PACK_COLUMNS)}")
    index = index.filter(pl.col("is_training_img") == train)
    if index["path"].to_list() != paths:
        raise pack_error(file, f"is not of the {'training' if train else 'test'} images in metadata.parquet")
    if about.get(PREPARED) != read_prepared(folder.parent):
        raise pack_error(file, f"is of images that were made otherwise than {folder.parent / PREPARED} says")
    return PackedImages(folder / PACK_FILES[train], paths, index["crc32"].to_numpy())


def read_prepared(root: Path) -> str:
    """The text of prepared.json, empty where there is none: in the folder of another program."""
    return (root / PREPARED).read_text() if (root / PREPARED).exists() else ""


def read_npy_header(opened: IO[bytes]) -> tuple[tuple[int, int, int, int], int]:
    """Shape (n, size, size, 3) of the images of a pack and the offset of the first; ValueError if it is not one."""
    if np.lib.format.read_magic(opened) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(opened)
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise ValueError(f"{dtype} {shape}, not images of uint8 (n, size, size, 3)")
    return shape, opened.tell()


def pack_error(file: Path, what: str) -> UserError:
    return UserError(f"{file} {what}: delete {file.parent} and run `main.py prepare --pack` again.")


def _size(file: Path) -> tuple[int, int] | str:
    """(height, width) from the file's head, or what is wrong with it."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(4096)  # a prepared image says its size in the first kilobyte
            if head[:2] != b"\xff\xd8":
                with open_picture(file) as picture:
                    return picture.size[::-1]
            opened.seek(-2, 2)
            if opened.read() != b"\xff\xd9":
                return "is a truncated JPEG"
            return simplejpeg.decode_jpeg_header(head)[:2]
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
