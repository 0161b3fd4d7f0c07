"""Decodes JPEGs that hold a whole picture, and refuses all others.

libjpeg fills the missing part of a picture with grey and warns, and viewers show that. Here each warning is an error,
and so is a missing scan, about which libjpeg says nothing. Some files break the standard and hold a whole picture all
the same. They are mended, and must then decode without a warning, too:
- rubbish, unknown segments and stray markers between the segments of the header, strange versions of JFIF or Adobe's;
- no end marker, though all data before it;
- a restart marker in data for which the header announced none;
- more data than the picture needs before the end marker, which is cut off. A run of one byte at the end goes first, so
  that a file in which zeros took the place of the missing part is refused, too.
libjpeg itself ignores what follows the end marker. Where a few bits in the data are wrong, nobody can tell: most of
such files decode without a warning.
"""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # their segments hold the size and the components
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_TABLES = (0xC4, 0xCC, 0xDB, 0xDD)  # what else decoding needs
_SCAN, _STOP, _JFIF, _EXIF, _ADOBE = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
_BARE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # no length and no content follow these
_UNKNOWN = frozenset((*range(0x02, 0xC0), 0xC8, *range(0xF0, 0xFE)))
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SPARE = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MOST_SCANS = 100  # each takes as long as the picture has pixels, and may be of few bytes
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")


class Header(NamedTuple):
    size: tuple[int, int]  # width, height
    exif: list[bytes]  # the contents of the segments that may hold it
    frame: bytes
    segments: list[tuple[int, int, int]]  # marker, start and end of each, up to that of the first scan
    data: int  # where the data of the first scan starts


def read_header(file: bytes) -> Header:
    """Raises ValueError for a file that ends, or stops making sense, before its picture begins."""
    segments, exif, frame = [], [], bytes(9) + b"\xff"  # too short
    for segment in _segments(file, 2):
        segments.append(segment)
        marker, start, end = segment
        if marker in _FRAMES:
            frame = file[start:end].ljust(10, b"\xff")
        elif marker == _EXIF:
            exif.append(file[start + 4 : end])
        elif marker == _SCAN and start + 10 <= end < len(file) and len(frame) >= 10 + 3 * frame[9]:
            height, width = frame[5] << 8 | frame[6], frame[7] << 8 | frame[8]
            return Header((width, height), exif, frame, segments, end)
        elif marker in (_SCAN, _STOP):
            break
    raise ValueError("a truncated JPEG (its header has no end)")


def decode(file: bytes, header: Header, scale: float = 1.0) -> tuple[np.ndarray, bool]:
    """uint8 (height, width, 3), and whether the file had to be mended; at 1, 1/2, 1/4 or 1/8 of its size, the smallest
    that is at least `scale`. Raises ValueError unless the whole picture is there."""
    if header.frame[4] != 8:
        raise ValueError(f"a JPEG with {header.frame[4]} bits a channel (convert it to 8)")
    if not _has_all_scans(file, header):
        raise ValueError("a truncated JPEG (some of its scans are missing)")
    try:
        return _decode(file, header, scale), False
    except ValueError:
        return _decode_mended(file, header, scale), True


def _decode(file: bytes, header: Header, scale: float) -> np.ndarray:
    smaller = {}
    if scale <= 0.5:
        factor = max(factor for factor in (2, 4, 8) if factor * scale <= 1)
        width, height = (-(-side // factor) for side in header.size)
        smaller = {"min_width": width, "min_height": height}
    if header.frame[9] != 4:
        return simplejpeg.decode_jpeg(file, "RGB", strict=True, **smaller)
    # Four components are ink, and every program that writes such files stores it inverted, as Adobe's.
    ink = 255 - simplejpeg.decode_jpeg(file, "CMYK", strict=True, **smaller)
    return np.asarray(Image.frombytes("CMYK", ink.shape[1::-1], ink.tobytes()).convert("RGB"))


def _decode_mended(file: bytes, header: Header, scale: float) -> np.ndarray:
    head, data = _mended(file, header)
    for _ in range(5):
        try:
            return _decode(head + data + _END, header, scale)
        except ValueError as error:
            problem = str(error)
        if not (spare := _SPARE.search(problem)):
            break
        filling = data[-1:]
        run = len(data) - len(data.rstrip(filling))
        data = data[: 1 - run] if run > 1 else data[: -int(spare[1])]
    if "subsampling" in problem:
        return _decode_unusual_sampling(head + data + _END)
    raise ValueError(f"a {'truncated' if 'remature end' in problem else 'damaged'} JPEG ({problem})")


def _decode_unusual_sampling(file: bytes) -> np.ndarray:
    """Pillow decodes what TurboJPEG does not, and does not tell whether it filled a part with grey."""
    try:
        with Image.open(io.BytesIO(file), formats=["JPEG"]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise ValueError(f"a damaged JPEG ({error})") from None
    height, width = pixels.shape[:2]
    if (pixels[(height - 1) // 8 * 8 :, (width - 1) // 8 * 8 :] == 128).all():
        raise ValueError("a truncated JPEG (its last block is empty)")
    return pixels


def _has_all_scans(file: bytes, header: Header) -> bool:
    """Whether each coefficient of each component comes in some scan, down to its last bit."""
    first, components = header.segments[-1], header.frame[9]
    progressive = header.frame[1] in _PROGRESSIVE
    if not progressive and file[first[1] + 4] == components:
        return True
    scans, _ = _scans(file, header)
    if len(scans) > _MOST_SCANS:
        raise ValueError(f"a JPEG with {len(scans):,} scans, more than any program writes")
    missing = {header.frame[10 + 3 * i]: np.ones(64, int) for i in range(components)}
    for scan in scans:
        selected = scan[5 : 5 + 2 * scan[4] : 2]
        start, stop, bits = scan[-3:] if progressive else (0, 63, 0)
        for component in selected:
            missing.get(component, np.empty(64, int))[start : stop + 1] = bits & 15
    return not any(bits.any() for bits in missing.values())


def _scans(file: bytes, header: Header) -> tuple[list[bytes], int]:
    """The segments that start the scans, and where the end marker is, or the file ends without one."""
    _, start, position = header.segments[-1]
    scans = [file[start:position]]
    while found := _AFTER_SCAN.search(file, position):
        for marker, start, end in _segments(file, found.start()):
            if marker == _STOP:
                return scans, start
            if marker == _SCAN and start + 10 <= end <= len(file):
                scans.append(file[start:end])
                position = end
                break
        else:
            break
    return scans, len(file)


def _mended(file: bytes, header: Header) -> tuple[bytes, bytes]:
    """The header with what decoding needs and nothing else; and the data up to the end marker."""
    kept, restarts = [_START], False
    for marker, start, end in header.segments:
        content = file[start + 4 : end]
        if marker in _FRAMES or marker in _TABLES or marker == _SCAN:
            kept.append(file[start:end])
            restarts |= marker == 0xDD and any(content)
        elif marker == _JFIF and content.startswith(b"JFIF\0"):
            kept.append(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
        elif marker == _ADOBE and content.startswith(b"Adobe") and len(content) >= 12:
            transform = 2 if header.frame[9] == 4 else 1  # what libjpeg assumes for a code that it does not know
            kept.append(file[start : start + 15] + bytes([transform if content[11] else 0]) + file[start + 16 : end])
    scans, end = _scans(file, header)
    data = file[header.data : end]
    return b"".join(kept), data if restarts or len(scans) > 1 else _RESTART.sub(b"", data)


def _segments(file: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment from a position on, until the file ends."""
    last = len(file) - 4
    while position <= last:
        marker = file[position + 1]
        if file[position] != 0xFF:
            position = file.find(b"\xff", position)
            if position < 0:
                return
        elif marker == 0xFF:  # any number of these may come before a marker
            position += 1
        elif marker in _BARE:
            position += 2
        else:
            end = position + 2 + (file[position + 2] << 8 | file[position + 3])
            if marker in _UNKNOWN and file[end : end + 1] != b"\xff":  # a stray marker, not a segment
                end = position + 2
            yield marker, position, end
            position = end
    if file[position : position + 2] == _END:
        yield _STOP, position, position + 2
