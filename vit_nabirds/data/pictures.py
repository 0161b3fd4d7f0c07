"""One reader of pictures for every command: by content, upright, whole or not at all."""

import contextlib
import dataclasses
import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from vit_nabirds.data import jpeg
from vit_nabirds.data.kinds import HEADER, JPEG, kind_of
from vit_nabirds.errors import quoted

MAX_PIXELS = 500_000_000
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` takes the place of Pillow's limit, which is of the whole process

_ORIENTATION = 0x0112  # EXIF's tag
# What makes a stored picture upright, in this order: exchange rows and columns, mirror the columns, mirror the rows.
_TO_UPRIGHT = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_EXIF_BYTES = {1: 1, 3: 2, 4: 4}  # type of a value -> its length

_NOT_JPEG = "files are not JPEG, whatever their name says"
_MENDED = "files are JPEGs that break the standard but hold a whole picture"
_ALPHA = "files have an alpha channel, which was dropped"
_SEVERAL = "files hold several pictures, of which the first was taken"
_DEEP = "files have 16 bits a channel, of which the upper 8 were taken"

_FILTERS = threading.Lock()  # around changes of the filters of warnings, which are of the whole process


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture whose header has been read; `read` decodes it."""

    kind: str  # Pillow's name of the format, or "array"
    stored_size: tuple[int, int]  # width, height
    orientation: int  # of EXIF, 1 to 8; 1 where there is none or it is nonsense
    oddities: list[str]  # what a summary counts; `read` adds some
    _decode: Callable[[float], np.ndarray] = dataclasses.field(repr=False)  # scale -> pixels as stored

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        return self.stored_size[::-1] if _TO_UPRIGHT[self.orientation][0] else self.stored_size

    def read(self, scale: float = 1.0) -> np.ndarray:
        """uint8 (height, width, 3), upright. With a `scale` below 1, a JPEG is decoded at the smallest of 1/8, 1/4, 1/2
        and 1 of its size, rounded up, that is not below it. Raises ValueError unless the whole picture is there."""
        pixels = self._decode(scale)
        if self.orientation == 1:
            return np.ascontiguousarray(pixels)
        exchanged, mirrored, upside_down = _TO_UPRIGHT[self.orientation]
        if exchanged:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1])

    def upright(self, box: tuple) -> tuple:
        """(left, top, width, height) in the stored picture -> in the upright one."""
        exchanged, mirrored, upside_down = _TO_UPRIGHT[self.orientation]
        left, top, width, height = box
        if exchanged:
            left, top, width, height = top, left, height, width
        if mirrored:
            left = self.size[0] - left - width
        if upside_down:
            top = self.size[1] - top - height
        return left, top, width, height


def open_picture(source: str | Path | bytes | Image.Image | np.ndarray, max_pixels: int = MAX_PIXELS) -> Picture:
    """A picture, not decoded yet, from a file, its contents, a Pillow image (left open) or an array (uint8; grey, RGB
    or RGBA). Raises ValueError with the reason if it cannot be used, OSError if the file cannot be read."""
    if isinstance(source, np.ndarray):
        return _open_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _open_image(source, max_pixels)
    if not isinstance(source, str | Path | bytes):
        raise ValueError(f"{source!r} is not a picture: expected a path, bytes, a PIL image or an array")
    data = source if isinstance(source, bytes) else _contents(source, max_pixels)
    if data.startswith(JPEG):  # a regular expression less
        return _open_jpeg(data, max_pixels)
    kind = kind_of(data[:HEADER])
    if kind == "JPEG":
        return _open_jpeg(data[data.index(JPEG) :], max_pixels)
    return _OPENERS.get(kind, _open_other)(data, kind, max_pixels)


def _contents(file: str | Path, max_pixels: int) -> bytes:
    """The bytes of a file, or of a pipe. Raises ValueError before reading much of what cannot be a picture."""
    status, limit = os.stat(file), 64 * 2**20 + 8 * max_pixels  # no format needs more bytes a pixel
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        raise ValueError("a device, not a file")
    with open(file, "rb", buffering=0) as opened:
        if stat.S_ISREG(status.st_mode) and status.st_size <= 2**20:
            return opened.readall()
        parts, length = [], 0
        while part := opened.read(2**24 if length >= HEADER else HEADER - length):
            parts.append(part)
            length += len(part)
            if length == HEADER:
                kind_of(b"".join(parts))
            if max(length, status.st_size) > limit:
                raise ValueError(
                    f"a file of more than {limit:,} bytes, which no picture of {max_pixels:,} pixels needs"
                )
    return b"".join(parts)


def _check_size(width: int, height: int, max_pixels: int, length: int | None = None) -> None:
    """`length` is that of the compressed file, where its format does not tell how few bytes the pixels may take."""
    if width * height > max_pixels:
        raise ValueError(
            f"{width}x{height} pixels, more than the limit of {max_pixels:,}: raise --max_pixels, or make it smaller"
        )
    if min(width, height) < 1:
        raise ValueError(f"{width}x{height} pixels")
    if length is not None and width * height > 2**24 + 1024 * length:
        raise ValueError(f"{width}x{height} pixels in {length:,} bytes, fewer than any photograph takes")


def _note(oddities: list[str], oddity: str) -> None:
    if oddity not in oddities:
        oddities.append(oddity)


# JPEG


def _open_jpeg(data: bytes, max_pixels: int) -> Picture:
    header = jpeg.read_header(data)
    width, height = header.size
    _check_size(width, height, max_pixels)
    if width * height > 2048 * len(data):  # Huffman codes take a bit a block of 64 pixels, at the very least
        raise ValueError(f"a truncated JPEG ({width}x{height} pixels in {len(data):,} bytes)")
    oddities = []

    def decode(scale: float) -> np.ndarray:
        pixels, mended = jpeg.decode(data, header, scale)
        if mended:
            _note(oddities, _MENDED)
        return pixels

    return Picture("JPEG", header.size, _orientation(header.exif), oddities, decode)


# All others


def _open_png(data: bytes, kind: str, max_pixels: int) -> Picture:
    """Pillow gets only what the pixels need: it refuses a PNG for any damage in its other chunks."""
    kept, exif, animated = [data[:8]], [], False
    width, height, depth, colour = struct.unpack_from(">IIBB", data.ljust(33, b"\0"), 16)
    _check_size(width, height, max_pixels)
    row = 1 + width * depth * {0: 1, 2: 3, 4: 2, 6: 4}.get(colour, 1) // 8
    if row * height > 2**20 + 1032 * len(data):  # deflate makes data no smaller than that
        raise ValueError(f"a truncated PNG ({width}x{height} pixels in {len(data):,} bytes)")
    position = 8
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + 12 + length]
        intact = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or name == b"tRNS" and intact:
            if not intact and len(chunk) == 12 + length and name != b"IEND":
                raise ValueError(f"a damaged PNG (wrong checksum of its {name.decode()})")
            kept.append(chunk)
        elif name == b"eXIf":
            exif.append(chunk[8:-4])
        animated |= name == b"acTL"
        position += len(chunk)
    picture = _open_other(b"".join(kept), kind, max_pixels, exif)
    if animated:
        _note(picture.oddities, _SEVERAL)
    return picture


def _open_gif(data: bytes, kind: str, max_pixels: int) -> Picture:
    """Pillow takes memory for the first frame, which may exceed the screen, when it opens a GIF."""
    width, height, flags = struct.unpack_from("<HHB", data.ljust(16, b"\0"), 6)
    position = 13 + (2 << (flags & 7)) * 3 * (flags >> 7)
    while data[position : position + 1] == b"!":  # extensions
        position += 2
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
    if data[position : position + 1] == b"," and position + 9 <= len(data):
        left, top, across, down = struct.unpack_from("<HHHH", data, position + 1)
        width, height = max(width, left + across), max(height, top + down)
    _check_size(width, height, max_pixels)
    return _open_other(data, kind, max_pixels)


def _open_avif(data: bytes, kind: str, max_pixels: int) -> Picture:
    """Without EXIF, which the decoder refuses when it is broken: an AVIF has its orientation elsewhere."""
    _refuse_blank_end(data, kind)
    return _open_other(re.sub(rb"(infe.{8})Exif", rb"\1none", data, flags=re.DOTALL), kind, max_pixels)


def _open_webp(data: bytes, kind: str, max_pixels: int) -> Picture:
    """Its decoder takes memory for the whole picture when it opens a WebP."""
    first, start = data[12:16], data.ljust(30, b"\0")
    if first == b"VP8X":
        size = [1 + int.from_bytes(start[at : at + 3], "little") for at in (24, 27)]
    elif first == b"VP8L":
        both = int.from_bytes(start[21:25], "little")
        size = [1 + (both & 0x3FFF), 1 + (both >> 14 & 0x3FFF)]
    else:
        size = [max(side & 0x3FFF, 1) for side in struct.unpack_from("<HH", start, 26)]
    _check_size(*size, max_pixels, len(data))
    position = 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        if name in (b"VP8 ", b"VP8L", b"ANMF"):
            _refuse_blank_end(data[: position + 8 + length], kind)
        position += 8 + length + length % 2
    return _open_other(data, kind, max_pixels)


def _open_heif(data: bytes, kind: str, max_pixels: int) -> Picture:
    """libheif turns the pixels upright itself, and ignores the orientation in EXIF, as the standard wants."""
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("a HEIC picture: pip install pillow-heif") from None
    _refuse_blank_end(data, kind)
    with _refusing(kind):
        opened = pillow_heif.open_heif(data)
        size = opened.size
    _check_size(*size, max_pixels, len(data))
    oddities = [_NOT_JPEG]

    def decode(_: float) -> np.ndarray:
        with _refusing(kind):
            image = opened.to_pillow()
        return _pixels(image, kind, oddities)

    return Picture(kind, size, 1, oddities, decode)


def _open_tiff(data: bytes, kind: str, max_pixels: int) -> Picture:
    """Pillow makes the pixels of a TIFF upright when it decodes it, so they are turned back into those stored."""
    with _quiet():
        opened, oddities = _open(data, kind), [_NOT_JPEG]
    _check_size(*opened.size, max_pixels, len(data))
    with _refusing(kind), _quiet():
        tags = dict(opened.tag_v2)
        is_preview = tags.get(254, 0) & 1 or 50706 in tags
        parts = zip(tags.get(273, tags.get(324, ())), tags.get(279, tags.get(325, ())), strict=False)
        is_short = tags.get(259, 1) != 1 and any(start + length > len(data) for start, length in parts)
        bits, white_is_zero = max(tags.get(258, (1,))), tags.get(262) == 0
        opened.info.pop("xmp", None)  # Pillow looks for an orientation there
        exif = opened.getexif()
        for tag in set(exif) - {_ORIENTATION}:  # directories that Pillow reads from the file, and may fail to
            del exif[tag]
        orientation = _valid(exif.get(_ORIENTATION))
    if is_preview:
        raise ValueError("a camera's raw file, or only a preview of one (export it as JPEG)")
    if is_short:  # libtiff notices it, and prints it
        raise ValueError("a truncated TIFF")
    exchanged, mirrored, upside_down = _TO_UPRIGHT[orientation]

    def decode(_: float) -> np.ndarray:
        pixels = _pixels(opened, kind, oddities, bits)
        if white_is_zero and opened.mode.startswith("I;16"):  # in other modes Pillow sees to that
            pixels = 255 - pixels
        pixels = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        return pixels.swapaxes(0, 1) if exchanged else pixels

    return Picture(kind, opened.size[::-1] if exchanged else opened.size, orientation, oddities, decode)


def _open_jpeg2000(data: bytes, kind: str, max_pixels: int) -> Picture:
    """Its decoder takes a file that ends after a tile for a whole one. The end marker never occurs in coded data."""
    if data.find(b"\xff\xd9", data.find(b"\xff\x93")) < 0:
        raise ValueError("a truncated JPEG2000 (it has no end marker)")
    return _open_other(data, kind, max_pixels)


def _open_other(data: bytes, kind: str, max_pixels: int, exif: list[bytes] | None = None) -> Picture:
    opened, oddities = _open(data, kind), [_NOT_JPEG]
    _check_size(*opened.size, max_pixels, None if kind == "PNG" else len(data))
    orientation = _orientation([opened.info.get("exif", b"")] if exif is None else exif)
    return Picture(kind, opened.size, orientation, oddities, lambda _: _pixels(opened, kind, oddities))


_OPENERS = {
    "PNG": _open_png,
    "GIF": _open_gif,
    "AVIF": _open_avif,
    "HEIF": _open_heif,
    "WEBP": _open_webp,
    "TIFF": _open_tiff,
    "JPEG2000": _open_jpeg2000,
}


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    with _refusing(kind):
        return Image.open(io.BytesIO(data), formats=[kind])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of each broken tag of a TIFF."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """What a decoder raises is a ValueError: a damaged file makes it raise anything."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"a truncated or damaged {kind} (its header makes no sense)") from None
    except Exception as error:  # noqa: BLE001
        truncated = re.search("truncated|end of file|could not create decoder|only got", str(error), re.IGNORECASE)
        raise ValueError(f"a {'truncated' if truncated else 'damaged'} {kind} ({quoted(error)})") from None


def _refuse_blank_end(data: bytes, kind: str) -> None:
    """A download that was cut has zeros in place of what is missing. Compressed pixels do not end in many zeros."""
    if data.endswith(bytes(64)):
        raise ValueError(f"a truncated {kind} (zeros in place of its end)")


def _pixels(image: Image.Image, kind: str, oddities: list[str], bits: int = 16) -> np.ndarray:
    """uint8 (height, width, 3), without alpha. `bits` is the depth of what Pillow gives as 16 bits."""
    if _is_one_of_several(image):
        _note(oddities, _SEVERAL)
    with _refusing(kind):
        image.load()
    mode = image.mode
    if mode.startswith("I;16") or mode == "I" and kind == "PPM":
        _note(oddities, _DEEP)
        return _grey((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if mode in ("I", "F"):
        raise ValueError("more than 16 bits a channel, or signed numbers: convert it to 8")
    if mode == "LAB":
        raise ValueError("a picture in LAB colours: convert it to RGB")
    if "A" in mode.upper() or "transparency" in image.info:
        _note(oddities, _ALPHA)
    if between := {"La": "LA", "P": "RGBA", "PA": "RGBA", "RGBa": "RGBA"}.get(mode):
        image = image.convert(between)  # Pillow warns of some palettes on their way to RGB, or knows no way
    if mode in ("1", "L", "LA", "La"):  # in RGB, Pillow would take five times the memory
        return _grey(np.asarray(image.convert("L")))
    return np.asarray(image.convert("RGB"))


def _is_one_of_several(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # noqa: BLE001, a GIF looks for the second picture, which may be damaged
        return False


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2)


# Pictures in memory


def _open_image(image: Image.Image, max_pixels: int) -> Picture:
    kind, oddities = image.format or "PIL", []
    _check_size(*image.size, max_pixels)
    with _refusing(kind):
        image.load()  # a TIFF is upright afterwards, and some PNGs have EXIF only then
    try:
        with _quiet():
            orientation = _valid(image.getexif().get(_ORIENTATION))
    except Exception:  # noqa: BLE001, for broken EXIF makes it raise anything
        orientation = 1
    return Picture(kind, image.size, orientation, oddities, lambda _: _pixels(image, kind, oddities))


def _open_array(array: np.ndarray, max_pixels: int) -> Picture:
    grey = array.ndim == 2 or array.ndim == 3 and array.shape[2] == 1
    if array.dtype != np.uint8 or not (grey or array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(
            f"an array of {array.dtype} {array.shape}: expected uint8 (height, width, 3), or (height, width) for grey"
        )
    _check_size(*array.shape[1::-1], max_pixels)
    oddities = [_ALPHA] if array.shape[2:] == (4,) else []
    decode = (lambda _: _grey(array.reshape(array.shape[:2]))) if grey else (lambda _: array[..., :3])
    return Picture("array", array.shape[1::-1], 1, oddities, decode)


# EXIF


def _orientation(segments: list[bytes]) -> int:
    """The orientation in the first of them that has EXIF, 1 to 8; 1 where it has none, or broken EXIF, or nonsense."""
    return next((found for segment in segments if (found := _orientation_in(segment))), 1)


def _valid(orientation: object) -> int:
    return int(orientation) if orientation in tuple(_TO_UPRIGHT) else 1


def _orientation_in(exif: bytes) -> int | None:
    """Pillow's parser raises, warns or is slow where EXIF is broken; this one only looks for the orientation."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return None
    (directory,) = struct.unpack_from(order + "I", exif, 4)
    if directory + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, directory)
    found = None
    for start in range(directory + 2, min(directory + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", exif, start)
        if tag == _ORIENTATION:
            value = exif[start + 8 : start + 8 + _EXIF_BYTES.get(kind, 0)]
            found = int.from_bytes(value, "little" if order == "<" else "big")
            found = found if found in _TO_UPRIGHT and values == 1 else None
    return found
