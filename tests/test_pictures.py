"""Which files count as pictures and which pixels they have, for every command that reads some."""

import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, TiffImagePlugin

from vit_nabirds.data.pictures import open_picture
from vit_nabirds.data.synthetic import draw_archive

pytestmark = [  # reading a picture never warns; what other tests leave to the garbage collector may
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
NOT_A_PICTURE = "not a picture in one of the formats AVIF, BMP, GIF, HEIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"


@functools.cache
def painted(width: int = 72, height: int = 48) -> np.ndarray:
    """Smooth, with another colour in each corner, and a little noise."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([20 + 200 * x / width, 20 + 200 * y / height, 120 + 90 * np.sin(x / 9 + y / 7)], axis=2)
    return (pixels + np.random.default_rng(0).integers(-5, 6, pixels.shape)).astype(np.uint8)


def saved(picture: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(**options) -> bytes:
    return saved(painted(), "JPEG", **({"quality": 90} | options))


def read(source, **limit) -> np.ndarray:
    picture = open_picture(source, **limit)
    pixels = picture.read()
    assert pixels.dtype == np.uint8 and pixels.shape == (*picture.size[::-1], 3) and pixels.flags.c_contiguous
    assert pixels.size > 10**6 or (picture.read() == pixels).all()  # again
    return pixels


def exif(orientation, order: str = ">", kind: int = 3, count: int = 1) -> bytes:
    """EXIF with a maker and an orientation."""
    value = orientation if isinstance(orientation, bytes) else struct.pack(order + "H", orientation)
    entries = struct.pack(order + "HHI4s", 0x010F, 2, 3, b"Me\0\0")
    entries += struct.pack(order + "HHI4s", 0x0112, kind, count, value)
    head = b"MM\0*" if order == ">" else b"II*\0"
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


def with_segment(file: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment, after those at its start."""
    return file[:20] + struct.pack(">BBH", 255, marker, len(content) + 2) + content + file[20:]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(file: bytes, name: bytes, content: bytes, position: int = 33) -> bytes:
    return file[:position] + chunk(name, content) + file[position:]


def with_exif(file: bytes, kind: str, content: bytes) -> bytes:
    """The file with EXIF, however broken, where its format has it."""
    if kind == "JPEG":
        return with_segment(file, 0xE1, content)
    if kind == "PNG":
        return with_chunk(file, b"eXIf", content.removeprefix(b"Exif\0\0"))
    assert kind == "WEBP" and file[12:16] in (b"VP8L", b"VP8 ")
    size = struct.pack("<I", 71)[:3] + struct.pack("<I", 47)[:3]
    chunks = b"VP8X" + struct.pack("<II", 10, 8) + size + file[12:]
    chunks += b"EXIF" + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def tiff(tags: list[tuple[int, int, int, bytes]], data: bytes = b"", order: str = "<") -> bytes:
    """A little TIFF: tag, type, count and value of each entry; the data starts at byte 8."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    entries = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in sorted(tags))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def tiff_of(pixels: np.ndarray, order: str = "<", photometric: int = 1, more: list = (), **changed) -> bytes:
    """An uncompressed TIFF of numbers of one kind."""
    height, width, channels = (*pixels.shape, 1)[:3]
    short, long = (lambda value: struct.pack(order + "H", value)), (lambda value: struct.pack(order + "I", value))
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    formats = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = [
        (256, 3, 1, short(width)),
        (257, 3, 1, short(height)),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(photometric)),
    ]
    tags += [(258, 3, 1, short(8 * pixels.itemsize)), (339, 3, 1, short(formats))]
    tags += [
        (273, 4, 1, long(8)),
        (277, 3, 1, short(channels)),
        (278, 3, 1, short(height)),
        (279, 4, 1, long(len(data))),
    ]
    return tiff([*tags, *more], data, order)


# Formats

P = Image.fromarray(painted()).quantize(200)
LOSSLESS = {
    "PNG": lambda: saved(painted(), "PNG"),
    "BMP": lambda: saved(painted(), "BMP"),
    "PPM": lambda: saved(painted(), "PPM"),
    "PPM in text": lambda: b"P3 72 48 255\n" + " ".join(map(str, painted().ravel())).encode(),
    "TIFF": lambda: saved(painted(), "TIFF"),
    "TIFF, LZW": lambda: saved(painted(), "TIFF", compression="tiff_lzw"),
    "TIFF, deflate": lambda: saved(painted(), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, packbits": lambda: saved(painted(), "TIFF", compression="packbits"),
    "BigTIFF": lambda: saved(painted(), "TIFF", big_tiff=True),
    "WEBP, lossless": lambda: saved(painted(), "WEBP", lossless=True),
    "JPEG2000": lambda: saved(painted(), "JPEG2000"),
    "JPEG2000, no container": lambda: saved(painted(), "JPEG2000", no_jp2=True),
    "JPEG2000, tiles": lambda: saved(painted(), "JPEG2000", tile_size=(32, 32)),
}
AS_PILLOW = {  # exactly
    "JPEG": jpeg,
    "JPEG, progressive": lambda: jpeg(progressive=True),
    "JPEG, 4:2:0": lambda: jpeg(subsampling="4:2:0"),
    "JPEG, optimised": lambda: jpeg(optimize=True),
    "JPEG, restart markers": lambda: jpeg(restart_marker_blocks=2),
    "JPEG, progressive, restart markers": lambda: jpeg(progressive=True, restart_marker_blocks=2),
    "JPEG, RGB": lambda: jpeg(keep_rgb=True),
    "JPEG, grey": lambda: saved(Image.fromarray(painted()).convert("L"), "JPEG"),
    "JPEG, grey, progressive": lambda: saved(Image.fromarray(painted()).convert("L"), "JPEG", progressive=True),
    "JPEG, CMYK": lambda: saved(Image.fromarray(painted()).convert("CMYK"), "JPEG"),
    "JPEG, YCCK": lambda: re.sub(b"(Adobe.{6})\0", b"\\1\2", AS_PILLOW["JPEG, CMYK"](), flags=re.DOTALL),
    "JPEG, CMYK, progressive": lambda: saved(Image.fromarray(painted()).convert("CMYK"), "JPEG", progressive=True),
    "MPO": lambda: saved(painted(), "MPO", save_all=True, append_images=[Image.fromarray(painted()[::-1])]),
    "WEBP": lambda: saved(painted(), "WEBP"),
    "AVIF": lambda: saved(painted(), "AVIF"),
    "AVIF, as a general HEIF": lambda: AS_PILLOW["AVIF"]().replace(b"ftypavif", b"ftypmif1", 1),
    "GIF": lambda: saved(P, "GIF"),
    "GIF, interlaced": lambda: saved(P, "GIF", interlace=1),
    "TIFF, JPEG": lambda: saved(painted(), "TIFF", compression="jpeg"),
    "TIFF, CMYK": lambda: saved(Image.fromarray(painted()).convert("CMYK"), "TIFF"),
    "BMP, palette": lambda: saved(P, "BMP"),
    "PNG, palette": lambda: saved(P, "PNG"),
    "PNG, palette of 4 bits": lambda: saved(Image.fromarray(painted()).quantize(12), "PNG"),
    "PNG, grey of 1 bit": lambda: saved(Image.fromarray(painted()).convert("1"), "PNG"),
    "TIFF, group 4": lambda: saved(Image.fromarray(painted()).convert("1"), "TIFF", compression="group4"),
    "PBM": lambda: saved(Image.fromarray(painted()).convert("1"), "PPM"),
    "PGM": lambda: saved(Image.fromarray(painted()).convert("L"), "PPM"),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_their_pixels(kind):
    assert (read(LOSSLESS[kind]()) == painted()).all()


@pytest.mark.parametrize("kind", AS_PILLOW)
def test_other_formats_have_the_pixels_that_viewers_show(kind):
    data = AS_PILLOW[kind]()
    with Image.open(io.BytesIO(data)) as opened:
        assert (read(data) == np.asarray(opened.convert("RGB"))).all()
    if "1 bit" not in kind and kind not in ("TIFF, group 4", "PBM"):
        grey = any(name in kind for name in ("grey", "PGM"))
        expected = np.asarray(Image.fromarray(painted()).convert("L"))[..., None] if grey else painted()
        if kind not in ("JPEG, YCCK",):  # made from the CMYK one, its colours are others
            assert np.abs(read(data).astype(int) - expected).mean() < 25


def test_cmyk_as_programs_other_than_adobes_store_it_has_the_same_colours():
    data = AS_PILLOW["JPEG, CMYK"]()
    start = data.index(b"Adobe") - 4
    assert np.abs(read(data[:start] + data[start + 16 :]).astype(int) - painted()).mean() < 4


@pytest.mark.parametrize("name", ["bird", "BIRD.JPG", "bird.jfif", "bird.heic", "bird.txt", "b\u00efrd .png"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_name_of_a_file_does_not_matter(tmp_path, name, kind):
    data = jpeg() if kind == "JPEG" else LOSSLESS[kind]()
    (tmp_path / name).write_bytes(data)
    (tmp_path / "link").symlink_to(name)
    for path in (tmp_path / name, str(tmp_path / name), tmp_path / "link"):
        picture = open_picture(path)
        assert picture.kind == kind and (picture.read() == read(data)).all()


def test_what_is_odd_is_noted_once_for_the_summary():
    assert open_picture(jpeg()).oddities == []
    transparent = Image.fromarray(painted()).convert("RGBA")
    for source, oddities in (
        (LOSSLESS["PNG"](), ["files are not JPEG, whatever their name says"]),
        (saved(transparent, "PNG"), ["files are not JPEG", "files have an alpha channel, which was dropped"]),
        (jpeg()[:-2], ["files are JPEGs that break the standard but hold a whole picture"]),
    ):
        picture = open_picture(source)
        picture.read(), picture.read()
        assert len(picture.oddities) == len(oddities)
        for oddity, expected in zip(picture.oddities, oddities, strict=True):
            assert oddity.startswith(expected)


# HEIC


def test_heic_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"heix\0\0\0\0mif1heix", b"msf1\0\0\0\0msf1hevc"):
        with pytest.raises(ValueError, match=re.escape("a HEIC picture: pip install pillow-heif")):
            open_picture(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100))


def test_heic_is_upright_and_whole():
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(painted())).save(file, format="HEIF", quality=95, exif=exif(6))
    picture = open_picture(file.getvalue())
    assert (picture.kind, picture.size, picture.orientation) == ("HEIF", (48, 72), 1)
    assert np.abs(picture.read().astype(int) - np.rot90(painted(), 3)).mean() < 6
    for end in range(40, len(file.getvalue()), 97):
        with pytest.raises(ValueError, match="HEIF"):
            read(file.getvalue()[:end])
    with pytest.raises(ValueError, match="a truncated HEIF"):
        read(file.getvalue()[:-400] + bytes(400))
    with pytest.raises(ValueError, match="48x72 pixels, more than the limit of 100"):
        open_picture(file.getvalue(), max_pixels=100)


# Orientation


def stored_for(orientation: int) -> np.ndarray:
    """The picture as a camera stores it that was held so."""
    across = painted().swapaxes(0, 1)
    stored = {
        1: painted(),
        2: painted()[:, ::-1],
        3: painted()[::-1, ::-1],
        4: painted()[::-1],
        5: across,
        6: across[::-1],
        7: across[::-1, ::-1],
        8: across[:, ::-1],
    }
    return np.ascontiguousarray(stored[orientation])


def container(kind: str, pixels: np.ndarray, content: bytes) -> bytes:
    if kind == "PNG, at its end":
        data = saved(pixels, "PNG")
        return with_chunk(data, b"eXIf", content[6:], len(data) - 12)
    if kind in ("JPEG", "PNG"):
        return with_exif(
            saved(pixels, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {})), kind, content
        )
    options = {"TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}.get(kind, {"quality": 95})
    return saved(pixels, kind, exif=content, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, at its end", "WEBP", "TIFF", "AVIF", "MPO"])
def test_pixels_and_boxes_are_upright(kind, orientation):
    stored = stored_for(orientation)
    picture = open_picture(container(kind, stored, exif(orientation)))
    assert picture.orientation == orientation and picture.stored_size == stored.shape[1::-1]
    assert picture.size == (72, 48)
    picture.read()
    pixels = picture.read().astype(int)
    assert np.abs(pixels - painted()).mean() < (6 if kind in ("JPEG", "AVIF", "MPO") else 1e-6)

    box = left, top, width, height = 3, 5, 20, 11
    inside = stored[top : top + height, left : left + width]
    left, top, width, height = picture.upright(box)
    found = painted()[top : top + height, left : left + width]
    assert sorted(map(tuple, inside.reshape(-1, 3))) == sorted(map(tuple, found.reshape(-1, 3)))
    assert picture.upright((0, 0, *picture.stored_size)) == (0, 0, *picture.size)


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_reduced_picture_is_upright_too(orientation, scale):
    picture = open_picture(container("JPEG", stored_for(orientation), exif(orientation)))
    small = picture.read(scale).astype(int)
    whole = Image.fromarray(picture.read()).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(small - np.asarray(whole)).mean() < 6


NONSENSE = {
    "0": exif(0),
    "9": exif(9),
    "65535": exif(65535),
    "a string": exif(b"6\0\0\0", kind=2, count=2),
    "two values": exif(struct.pack(">HH", 6, 6), count=2),
    "no values": exif(6, count=0),
    "a fraction": exif(struct.pack(">I", 8), kind=5),
    "an unknown type": exif(6, kind=99),
    "eight bytes": b"Exif\0\0" + bytes.fromhex("0008000201120003"),
    "blank": b"Exif\0\0",
    "zeros": b"Exif\0\0" + bytes(100),
    "nothing": b"",
    "foreign": b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>",
    "text": b"a photograph of a bird",
    "no directory": exif(6)[:14],
    "a directory beyond the end": b"Exif\0\0MM\0*" + struct.pack(">I", 10**6) + bytes(20),
    "a directory at the end": b"Exif\0\0MM\0*" + struct.pack(">I", 27) + bytes(20),
    "a directory before the start": b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20),
    "cut in an entry": exif(6)[:-10],
    "65535 entries": exif(3)[:14] + b"\xff\xff" + exif(9)[16:],
    "a wrong byte order": exif(6).replace(b"MM", b"XX"),
}  # fmt: skip


@pytest.mark.parametrize("content", NONSENSE)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_the_orientation_at_most(kind, content):
    plain = saved(painted(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    picture = open_picture(with_exif(plain, kind, NONSENSE[content]))
    assert picture.orientation == 1 and (picture.read() == read(plain)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_only_odd_keeps_the_orientation(kind):
    plain = saved(painted(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    for content in (
        exif(6, "<"),
        exif(struct.pack(">I", 6), kind=4),
        exif(b"\6", kind=1),
        b"Exif\0\0" + exif(6),  # its head doubled
        exif(6) + b"rubbish",
        exif(6)[:14] + b"\xff\xff" + exif(6)[16:],  # more entries than there are
    ):
        assert open_picture(with_exif(plain, kind, content)).orientation == 6


def test_of_two_exif_segments_the_first_good_one_counts():
    for contents, expected in (
        ([exif(6), exif(3)], 6),
        ([exif(6), exif(6)], 6),
        ([NONSENSE["eight bytes"], exif(8)], 8),
        ([exif(8), NONSENSE["cut in an entry"]], 8),
        ([NONSENSE["foreign"], exif(5)], 5),
    ):
        data = functools.reduce(lambda file, content: with_segment(file, 0xE1, content), reversed(contents), jpeg())
        assert open_picture(data).orientation == expected
        data = functools.reduce(
            lambda file, content: with_exif(file, "PNG", content), reversed(contents), LOSSLESS["PNG"]()
        )
        assert open_picture(data).orientation == expected


def test_a_png_with_a_wrong_checksum_of_what_is_not_pixels_is_read():
    for name, content in ((b"eXIf", exif(6)[6:]), (b"tEXt", b"Title\0bird"), (b"iCCP", b"x\0\0junk"), (b"gAMA", b"\0")):
        data = bytearray(with_chunk(LOSSLESS["PNG"](), name, content))
        data[33 + 8 + len(content)] ^= 1
        assert (open_picture(bytes(data)).read() == (np.rot90(painted(), 3) if name == b"eXIf" else painted())).all()
    text = b"Comment\0\0" + zlib.compress(bytes(100_000_000))  # Pillow refuses so much text
    assert (read(with_chunk(LOSSLESS["PNG"](), b"zTXt", text)) == painted()).all()


def test_broken_tags_of_a_tiff_cost_the_orientation_at_most():
    plain, entry = tiff_of(painted(), photometric=2), struct.pack
    assert (read(plain) == painted()).all()
    for tags, orientation in (
        ([(0x0112, 3, 1, b"\6")], 6),
        ([(0x0112, 3, 1, b"\6"), (0x0112, 3, 1, b"\6")], 6),
        ([(0x0112, 3, 1, b"\0")], 1),
        ([(0x0112, 3, 1, b"\x09")], 1),
        ([(0x0112, 2, 2, b"6\0")], 1),
        ([(0x8769, 4, 1, entry("<I", 10**6)), (0x0112, 3, 1, b"\6")], 6),  # EXIF beyond the end
        ([(0x8769, 4, 1, entry("<I", 3)), (0x0112, 3, 1, b"\6")], 6),  # EXIF that makes no sense
        ([(0x8769, 2, 4, b"abc"), (0x8825, 4, 1, entry("<I", 2**32 - 1))], 1),
        ([(0x010F, 2, 10**6, entry("<I", 10**6))], 1),
        ([(700, 1, 30, entry("<I", 8))], 1),
    ):
        picture = open_picture(tiff_of(painted(), photometric=2, more=tags))
        assert picture.orientation == orientation
        assert (picture.read() == (np.rot90(painted(), 3) if orientation == 6 else painted())).all()


def test_an_orientation_in_xmp_alone_does_not_count():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = with_segment(jpeg(), 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    assert (read(data) == read(jpeg())).all()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = xmp
    assert (read(saved(painted(), "TIFF", tiffinfo=tags)) == painted()).all()


def test_broken_exif_does_not_cost_an_avif():
    data = saved(painted(), "AVIF", exif=exif(6))
    for broken in (data.replace(b"MM\0*", b"abcd"), data.replace(b"MM\0*", bytes(4))):
        assert broken != data and (read(broken) == read(data)).all() and open_picture(broken).orientation == 6


# Whole JPEGs that break the standard


def before_scan(inserted: bytes):
    return lambda file: file.replace(b"\xff\xda", inserted + b"\xff\xda", 1)


def adobe(transform: int) -> bytes:
    return b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


WHOLE = {
    "no end marker": lambda f: f[:-2],
    "half an end marker": lambda f: f[:-1],
    "zeros in place of the end marker": lambda f: f[:-2] + bytes(2),
    "no end marker but zeros": lambda f: f[:-2] + bytes(5000),
    "zeros before the start": lambda f: bytes(7) + f,
    "text before the start": lambda f: b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + f,
    "bytes before the start": lambda f: b"\x80\xff\x00\xfe\x13" + f,
    "a doubled start": lambda f: b"\xff\xd8" + f,
    "zeros after the end": lambda f: f + bytes(5000),
    "rubbish after the end": lambda f: f + b"rubbish \xff\xda\xff\xd8\xff\xc0" * 30,
    "another JPEG after the end": lambda f: f + f,
    "half a JPEG after the end": lambda f: f + f[: len(f) // 2],
    "zeros before the end marker": lambda f: f[:-2] + bytes(500) + f[-2:],
    "0xff before the end marker": lambda f: f[:-2] + b"\xff" * 500 + f[-2:],
    "text before the end marker": lambda f: f[:-2] + b"rubbish, but not much of it" + f[-2:],
    "a stray marker before the end marker": lambda f: f[:-2] + b"\xff\xd3" + f[-2:],
    "a doubled end marker": lambda f: f + f[-2:],
    "a comment before the end marker": lambda f: f[:-2] + b"\xff\xfe\0\x06bird" + f[-2:],
    "a restart marker in the header": before_scan(b"\xff\xd3"),
    "TEM in the header": before_scan(b"\xff\x01"),
    "an unknown marker in the header": before_scan(b"\xff\x02"),
    "an unknown segment in the header": before_scan(b"\xff\x02\0\6bird"),
    "an unknown last segment in the header": before_scan(b"\xff\xf0\0\6bird"),
    "rubbish in the header": before_scan(b"rubbish"),
    "zeros in the header": before_scan(bytes(100)),
    "0xff in the header": before_scan(b"\xff" * 9),
    "a start marker in the header": before_scan(b"\xff\xd8"),
    "an empty comment of length 0": before_scan(b"\xff\xfe\0\0"),
    "a strange version of JFIF": lambda f: f[:11] + b"\x09" + f[12:],
    "a strange transform of Adobe's": lambda f: f[:2] + adobe(7) + f[20:],
    "transform 2 of Adobe's": lambda f: f[:2] + adobe(2) + f[20:],
    "no JFIF": lambda f: f[:2] + f[20:],
    "a broken colour profile": lambda f: with_segment(f, 0xE2, b"ICC_PROFILE\0\x09\x01ab"),
    "an empty application segment": lambda f: with_segment(f, 0xE5, b""),
    "a thumbnail in a segment": lambda f: with_segment(f, 0xE1, b"Exif\0\0" + f),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_a_jpeg_that_shows_a_whole_picture_in_viewers_is_read(kind, options):
    plain = jpeg(**options)
    changed = WHOLE[kind](plain)
    assert changed != plain and (read(changed) == read(plain)).all()
    reduced = open_picture(changed).read(0.3)
    assert (reduced == open_picture(plain).read(0.3)).all()


def test_a_mended_jpeg_keeps_its_colours():
    named = bytearray(jpeg())  # its components are called R, G and B, but JFIF wants Y, Cb and Cr
    frame, scan = named.index(b"\xff\xc0"), named.index(b"\xff\xda")
    named[frame + 10 : frame + 19 : 3] = named[scan + 5 : scan + 11 : 2] = b"RGB"
    for plain in (bytes(named), AS_PILLOW["JPEG, YCCK"](), AS_PILLOW["JPEG, CMYK"](), AS_PILLOW["JPEG, RGB"]()):
        changed = before_scan(b"rubbish")(plain[:-2])
        assert (read(changed) == read(plain)).all()
    assert (read(bytes(named)) == read(jpeg())).all()


def test_restart_markers_that_were_not_announced_are_left_out():
    plain = jpeg()
    for marker in (b"\xff\xd0", b"\xff\xd3", b"\xff\xd7"):
        middle = half(plain)
        assert (read(plain[:middle] + marker + plain[middle:]) == read(plain)).all()


def test_a_stray_marker_between_the_scans_of_a_progressive_jpeg_is_skipped():
    plain = jpeg(progressive=True)
    scan = plain.index(b"\xff\xda", plain.index(b"\xff\xda") + 2)
    assert (read(plain[:scan] + b"\xff\xd3" + plain[scan:]) == read(plain)).all()


# Damaged JPEGs


def half(file: bytes, share: float = 0.5) -> int:
    """A position in the data of the first scan, not within a marker."""
    start = file.index(b"\xff\xda") + 14
    position = start + int((len(file) - start) * share)
    while 255 in file[position - 2 : position + 2]:
        position += 1
    return position


ENDS = {
    "nothing": b"",
    "the end marker": b"\xff\xd9",
    "half a marker": b"\xff",
    "two end markers": b"\xff\xd9\xff\xd9",
    "zeros": bytes(3000),
    "zeros and the end marker": bytes(3000) + b"\xff\xd9",
    "0xff": b"\xff" * 3000,
    "the end marker and zeros": b"\xff\xd9" + bytes(3000),
    "a restart marker": b"\xff\xd1",
    "another start": b"\xff\xd8\xff\xe0",
    "a comment": b"\xff\xfe\0\6bird\xff\xd9",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}], ids=str
)
def test_a_cut_jpeg_is_refused_whatever_its_end(end, options):
    plain = jpeg(**options)
    for share in (0.01, 0.3, 0.5, 0.9, 0.97):
        with pytest.raises(ValueError, match="a (truncated|damaged) JPEG"):
            read(plain[: half(plain, share)] + ENDS[end])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_a_jpeg_cut_anywhere_is_refused_or_whole(options):
    plain = jpeg(**options)
    for end in range(2, len(plain) - 2, 7):
        for tail in (b"", b"\xff\xd9"):
            with pytest.raises(ValueError, match="truncated|damaged|not a picture"):
                read(plain[:end] + tail)
    for end in range(len(plain) - 12, len(plain) - 2):  # the last of the data
        with pytest.raises(ValueError, match="a (truncated|damaged) JPEG"):
            read(plain[:end] + b"\xff\xd9")


@pytest.mark.parametrize("grey", [False, True])
def test_a_progressive_jpeg_cut_between_scans_is_refused(grey):
    plain = saved(Image.fromarray(painted()).convert("L") if grey else painted(), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff\xda", plain)][1:]
    assert len(scans) >= 5
    for scan in scans:
        for cut in (scan, plain.rindex(b"\xff\xc4", 0, scan)):
            for tail in (b"", b"\xff\xd9", b"\xff\xd9" + bytes(99)):
                with pytest.raises(ValueError, match="a truncated JPEG"):
                    read(plain[:cut] + tail)


def test_a_missing_scan_is_noticed_in_a_jpeg_with_a_scan_for_each_colour():
    plain = flat_jpeg(bytes(9))
    start = plain.index(b"\xff\xda")
    scans = [b"\xff\xda\0\x08\x01" + bytes([component, 0]) + b"\0\x3f\0" for component in (1, 2, 3)]
    scans = [scans[0] + plain[start + 14 : start + 20] + bytes(14), scans[1] + bytes(16), scans[2] + bytes(16)]
    assert (read(plain[:start] + b"".join(scans) + b"\xff\xd9") == 200).all()
    for kept in (scans[:1], scans[:2], scans[1:]):
        with pytest.raises(ValueError, match="a truncated JPEG"):
            read(plain[:start] + b"".join(kept) + b"\xff\xd9")


def test_damage_that_the_decoder_notices_is_refused():
    restarting = jpeg(restart_marker_blocks=3)
    marker = restarting.index(b"\xff\xd3", restarting.index(b"\xff\xda") + 14)
    plain, middle = jpeg(), half(jpeg())
    for damaged in (
        restarting[:marker] + restarting[marker + 2 :],  # a lost restart marker
        restarting[:marker] + b"\xff\xd3" + restarting[marker:],  # one too many
        restarting[:marker] + restarting[marker + 40 :],
        plain[:middle] + b"\xff\xd9" + plain[middle:],  # an end in the middle
        plain[:middle] + b"\xff\xd8" + plain[middle:],
        plain[:middle] + b"\xff\xfe" + plain[middle:],
        plain[:middle] + b"\xff\x02" + plain[middle:],
        plain[:middle] + b"\xff\xc4\0\x04ab" + plain[middle:],
        plain[:middle] + bytes(900) + plain[middle + 900 :],
        plain[:middle] + plain[middle + 300 :],  # a lost part
    ):
        with pytest.raises(ValueError, match="a (truncated|damaged) JPEG"):
            read(damaged)


def flat_jpeg(more: bytes = b"", size: tuple[int, int] = (64, 64), sampling: bytes = b"\x11\x11\x11") -> bytes:
    """A grey picture of 200 in which each block but the first takes two bits, both zero."""
    plain = saved(np.full((64, 64, 3), 200, np.uint8), "JPEG", optimize=True, subsampling=0)
    frame = bytearray(plain)
    start = plain.index(b"\xff\xc0")
    frame[start + 5 : start + 9] = struct.pack(">HH", *size[::-1])
    frame[start + 11], frame[start + 14], frame[start + 17] = sampling
    return bytes(frame[:-2]) + more + b"\xff\xd9"


def test_samplings_that_turbojpeg_does_not_know():
    for sampling in (b"\x42\x11\x11", b"\x31\x11\x11", b"\x13\x11\x11", b"\x11\x21\x11", b"\x14\x21\x11"):
        assert (read(flat_jpeg(bytes(999), (200, 150), sampling)) == 200).all()
        with pytest.raises(ValueError, match="JPEG"):
            read(flat_jpeg(b"", (200, 150), sampling)[:-40] + b"\xff\xd9")


def test_jpegs_of_kinds_that_nobody_decodes_are_called_what_they_are():
    plain = jpeg()
    start = plain.index(b"\xff\xc0")
    for changed, message in (
        (plain[: start + 4] + b"\x0c" + plain[start + 5 :], "a JPEG with 12 bits a channel"),
        (plain[: start + 5] + b"\0\0" + plain[start + 7 :], "72x0 pixels"),
        (plain[: start + 7] + b"\0\0" + plain[start + 9 :], "0x48 pixels"),
        (plain[:start], "a truncated JPEG"),
        (plain[: start + 6], "a truncated JPEG"),
        (b"\xff\xd8\xff\xd9", "a truncated JPEG"),
        (b"\xff\xd8\xff", "a truncated JPEG"),
        (plain[:start] + plain[plain.index(b"\xff\xc4") :], "a truncated JPEG"),  # no size
    ):
        with pytest.raises(ValueError, match=message):
            read(changed)


# Other damaged pictures


CUT = {
    "PNG": LOSSLESS["PNG"],
    "PNG, palette": AS_PILLOW["PNG, palette"],
    "GIF": AS_PILLOW["GIF"],
    "WEBP": AS_PILLOW["WEBP"],
    "WEBP, lossless": LOSSLESS["WEBP, lossless"],
    "BMP": LOSSLESS["BMP"],
    "BMP, palette": AS_PILLOW["BMP, palette"],
    "PPM": LOSSLESS["PPM"],
    "JPEG2000": LOSSLESS["JPEG2000"],
    "JPEG2000, tiles": LOSSLESS["JPEG2000, tiles"],
    "JPEG2000, no container": LOSSLESS["JPEG2000, no container"],
    "AVIF": AS_PILLOW["AVIF"],
    "TIFF": LOSSLESS["TIFF"],
    "TIFF, LZW": LOSSLESS["TIFF, LZW"],
    "TIFF, deflate": LOSSLESS["TIFF, deflate"],
}


@pytest.mark.parametrize("kind", CUT)
def test_a_file_cut_anywhere_is_refused_or_whole(kind):
    plain = CUT[kind]()
    for end in sorted({*range(1, len(plain), max(len(plain) // 97, 1)), *range(len(plain) - 9, len(plain))}):
        try:
            pixels = read(plain[:end])
        except ValueError as error:
            assert "truncated" in str(error) or "damaged" in str(error) or end < 30
        else:  # only what viewers do not need is missing
            assert end >= len(plain) - 12 and (pixels == read(plain)).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF, LZW"])
def test_a_file_with_zeros_in_place_of_its_second_half_is_refused(kind):
    plain = CUT[kind]()
    middle = len(plain) // 2
    with pytest.raises(ValueError, match="a (truncated|damaged).* " + kind.split(",")[0]):
        read(plain[:middle] + bytes(len(plain) - middle))


def test_a_jpeg2000_cut_after_a_tile_is_refused():
    plain = LOSSLESS["JPEG2000, tiles"]()
    tiles = [found.start() for found in re.finditer(b"\xff\x90\0\x0a", plain)]
    assert len(tiles) == 6
    for tile in tiles:
        with pytest.raises(ValueError, match="a truncated JPEG2000"):
            read(plain[:tile])


@pytest.mark.parametrize("position", [50, 300, 5000])
def test_a_png_with_a_changed_byte_is_refused(position):
    data = bytearray(LOSSLESS["PNG"]())
    data[position] ^= 1
    with pytest.raises(ValueError, match="a damaged PNG"):
        read(bytes(data))


def test_zeros_and_rubbish_after_the_end_do_not_matter():
    for kind, make in {**LOSSLESS, **AS_PILLOW}.items():
        if kind not in (
            "AVIF",
            "AVIF, as a general HEIF",
            "JPEG2000",
            "JPEG2000, tiles",
            "PPM in text",
        ):  # boxes, numbers up to the end
            for more in (bytes(300), b"rubbish" * 9):
                assert (read(make() + more) == read(make())).all(), kind


# Depth, alpha, animation


def test_sixteen_bits_are_scaled_down():
    wide = (painted()[..., 0].astype(np.uint16) << 8) + 77
    grey = np.repeat(painted()[..., :1], 3, axis=2)
    for data in (
        saved(wide, "PNG"),
        saved(wide, "TIFF"),
        saved(wide, "TIFF", compression="tiff_lzw"),
        tiff_of(wide, "<"),
        tiff_of(wide, ">"),
        tiff_of(65535 - wide, photometric=0),  # white is zero
        b"P5 72 48 65535\n" + wide.astype(">u2").tobytes(),
    ):
        picture = open_picture(data)
        assert (picture.read() == grey).all()
        assert "files have 16 bits a channel, of which the upper 8 were taken" in picture.oddities
    rows = (painted().astype(">u2") << 8).astype(">u2") + np.uint16(200)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 72, 48, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert (read(data) == painted()).all()
    assert np.abs(read(b"P6 72 48 65535\n" + rows.astype(">u2").tobytes()).astype(int) - painted()).max() <= 1


def test_other_numbers_are_refused():
    numbers = painted()[..., 0]
    for data in (
        saved(Image.fromarray(numbers.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(numbers.astype(np.float32)), "TIFF"),
        tiff_of(numbers.astype(np.int16)),
        tiff_of(numbers.astype(np.uint32)),
    ):
        with pytest.raises(ValueError, match="^more than 16 bits a channel, or signed numbers: convert it to 8"):
            read(data)


def test_alpha_is_dropped_and_counted():
    pixels = np.dstack([painted(), np.tile(np.arange(72, dtype=np.uint8), (48, 1))])
    grey = np.repeat(np.asarray(Image.fromarray(painted()).convert("L"))[..., None], 3, axis=2)
    palette = Image.fromarray(painted()).quantize(16)
    opaque = np.asarray(palette.convert("RGB"))
    for data, expected in (
        (saved(pixels, "PNG"), painted()),
        (saved(pixels, "TIFF"), painted()),
        (saved(pixels, "WEBP", lossless=True, exact=True), painted()),
        (saved(Image.fromarray(pixels).convert("LA"), "PNG"), grey),
        (saved(palette, "PNG", transparency=3), opaque),
        (saved(palette, "PNG", transparency=bytes(range(16))), opaque),
        (saved(palette, "GIF", transparency=3), opaque),
        (saved(painted(), "PNG", transparency=tuple(map(int, painted()[0, 0]))), painted()),
        (saved(Image.fromarray(painted()[..., 0]), "PNG", transparency=77), np.repeat(painted()[..., :1], 3, axis=2)),
        (pixels, painted()),
        (Image.fromarray(pixels), painted()),
    ):
        picture = open_picture(data)
        assert (picture.read() == expected).all()
        assert "files have an alpha channel, which was dropped" in picture.oddities


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_picture_is_taken(kind):
    frames = [Image.fromarray(painted()), Image.fromarray(255 - painted())]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = open_picture(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(picture.read().astype(int) - painted()).mean() < (1e-6 if kind in ("PNG", "WEBP", "TIFF") else 20)
    assert "files hold several pictures, of which the first was taken" in picture.oddities


def test_a_png_with_a_still_picture_beside_its_animation_shows_that():
    frames = [Image.fromarray(painted()), Image.fromarray(255 - painted())]
    data = saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert (read(data) == painted()).all()


# Not pictures


@pytest.mark.parametrize(
    "data, name",
    [
        (b"", "an empty file"),
        (bytes(3000), "nothing but zeros"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\r\n  <HTML>", "an HTML page"),
        (b"<!-- a comment -->\n<html>", "an HTML page"),
        (b"<head><title>Not found</title>", "an HTML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="9"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML file"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
        (b"\n\n%PDF-1.7", "a PDF document"),
        (POSTSCRIPT, "a PostScript file"),
        (b"\xc5\xd0\xd3\xc6" + bytes(40), "a PostScript file"),
        (b'{"error": "rate limit"}', "a JSON file"),
        (b"[1, 2]", "a JSON file"),
        (b"404 not found\n", "text"),
        ("ein Vogel, größer".encode(), "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (b"PK\3\4" + bytes(40), "a ZIP archive"),
        (b"\x1f\x8b\x08" + bytes(40), "a compressed file"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"\x1aE\xdf\xa3" + bytes(40), "a video"),
        (b"RIFF\x24\0\0\0AVI LIST", "a video"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a sound file"),
        (b"ID3\4" + bytes(40), "a sound file"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop document"),
        (b"\0\0\1\0\1\0" + bytes(40), "an icon"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL file"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a camera's raw file"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "a camera's raw file"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw file"),
        (b"\0\5\x16\7" + bytes(40), "macOS metadata"),
        (b"\x93NUMPY\1\0", "a data file"),
        (b"\x7fELF" + bytes(40), "a program"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_picture_is_called_what_it_is(data, name, tmp_path):
    (tmp_path / "bird.jpg").write_bytes(data)
    for source in (data, tmp_path / "bird.jpg"):
        with pytest.raises(ValueError, match=f"^{name}.*, {NOT_A_PICTURE}$"):
            open_picture(source)


def test_what_nobody_knows_is_not_a_picture():
    for data in (b"\x87" * 99, bytes(range(256)), b"BM", b"GIF", b"\xff\xd8", b"\x89PNG"):
        with pytest.raises(ValueError, match=f"{NOT_A_PICTURE}$"):
            open_picture(data)


def test_the_preview_in_a_cameras_raw_file_is_not_taken_for_the_picture():
    reduced = [(254, 4, 1, b"\1")]
    for more in (reduced, [(50706, 1, 4, b"\1\4\0\0")]):
        with pytest.raises(ValueError, match="a camera's raw file, or only a preview"):
            open_picture(tiff_of(painted(), photometric=2, more=more))
    hidden = b"\xd0\xcf\x11\xe0" + bytes(100) + jpeg()  # in a Word document
    with pytest.raises(ValueError, match="an Office document"):
        open_picture(hidden)
    with pytest.raises(ValueError, match=NOT_A_PICTURE):
        open_picture(b"\x87" * 1100 + jpeg())


# Size


def bilevel(side: int) -> bytes:
    raw = zlib.compressobj(1)
    row = b"\0" + b"\x0f" * ((side + 7) // 8)
    packed = b"".join(raw.compress(row) for _ in range(side)) + raw.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_picture_of_182_million_pixels_is_read():
    pixels = read(bilevel(13_500))
    assert pixels.shape == (13_500, 13_500, 3) and (pixels[::4999, :8, 0] == [0, 0, 0, 0, 255, 255, 255, 255]).all()
    del pixels
    data = flat_jpeg(bytes((1688 * 1688 - 64) * 6 // 8), (13_500, 13_500))
    small = open_picture(data).read(0.1)
    assert small.shape == (1688, 1688, 3) and (small == 200).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: flat_jpeg(bytes(400_000), (13_500, 13_500)),
        lambda: bilevel(13_500),
        lambda: b"GIF89a" + struct.pack("<HHBBB", 13_500, 13_500, 0, 0, 0) + b",",
        lambda: b"P4 13500 13500\n",
        lambda: tiff_of(np.zeros((1, 1), np.uint8)).replace(b"\1\3\0\1\0\0\0\1\0", b"\1\3\0\1\0\0\0\xbc\x34", 2),
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 13_500, 13_500, 1, 24, 0, 0, 0, 0, 0, 0),
        lambda: Image.new("1", (13_500, 13_500)),
        lambda: np.broadcast_to(np.uint8(0), (13_500, 13_500)),
    ],
)
def test_one_limit_with_one_message(make):
    with pytest.raises(ValueError, match="^13500x13500 pixels, more than the limit of 182,249,999: "):
        open_picture(make(), max_pixels=13_500**2 - 1)


def test_the_limit_counts_pixels_not_sides():
    data = saved(np.zeros((10, 20, 3), np.uint8), "PNG")
    assert read(data, max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(ValueError, match="20x10 pixels, more than the limit of 199"):
        open_picture(data, max_pixels=199)


HUGE = """
import resource, sys
from vit_nabirds.data.pictures import open_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        open_picture(name).read()
        print("read")
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_small_file_that_claims_to_be_huge_takes_no_memory(tmp_path):
    plain, claims = jpeg(), []
    start = plain.index(b"\xff\xc0")
    for name, side in (("a.jpg", 65_500), ("b.jpg", 20_000)):
        data = plain[: start + 5] + struct.pack(">HH", side, side) + plain[start + 9 :]
        claims.append((name, data))
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    gif = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"!\xf9\4\x08\0\0\0\0,"
    gif += struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\2\2\x44\1\0;"
    for name, data in (*claims, ("c.png", png), ("d.gif", gif)):
        (tmp_path / name).write_bytes(data)
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}, text=True)
    names = [name for name, _ in claims] + ["c.png", "d.gif"]
    done = subprocess.run([sys.executable, "-c", HUGE, *names], capture_output=True, **options)
    first, second, third, fourth, megabytes = done.stdout.splitlines()
    assert first.startswith("65500x65500 pixels, more than the limit of 500,000,000: ")
    assert second.startswith("a truncated JPEG (20000x20000 pixels in ")
    assert third.startswith("a truncated PNG (20000x20000 pixels in ")
    assert fourth.startswith("65535x65535 pixels, more than the limit")
    assert int(megabytes) < 60 and not done.stderr


def test_a_jpeg_is_decoded_at_a_reduced_scale():
    pixels = painted(301, 203)
    picture = open_picture(saved(pixels, "JPEG", quality=95))
    for scale, factor in (
        (1, 1),
        (2.5, 1),
        (0.51, 1),
        (0.5, 2),
        (0.26, 2),
        (0.25, 4),
        (0.13, 4),
        (0.125, 8),
        (0.01, 8),
    ):
        small = picture.read(scale)
        assert small.shape == (-(-203 // factor), -(-301 // factor), 3)
        rows, columns = 203 // factor, 301 // factor
        blocks = pixels[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        assert np.abs(small[:rows, :columns] - blocks.mean(axis=(1, 3))).mean() < 3
    assert open_picture(saved(painted()[:3, :5], "JPEG")).read(0.01).shape == (1, 1, 3)
    assert open_picture(AS_PILLOW["JPEG, CMYK"]()).read(0.5).shape == (24, 36, 3)
    assert open_picture(LOSSLESS["PNG"]()).read(0.1).shape == (48, 72, 3)
    cut = jpeg()[: half(jpeg(), 0.9)]
    for end in (b"", b"\xff\xd9"):
        with pytest.raises(ValueError, match="a truncated JPEG"):
            open_picture(cut + end).read(0.125)


# Files


def test_a_pipe_is_read_like_a_file(tmp_path):
    pipe = tmp_path / "bird.jpg"
    os.mkfifo(pipe)
    big = saved(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8), "PNG")
    for data in (jpeg(), big):
        writer = threading.Thread(target=pipe.write_bytes, args=(data,))
        writer.start()
        assert (read(pipe) == read(data)).all()
        writer.join()


def test_devices_folders_and_endless_pipes_are_refused(tmp_path):
    (tmp_path / "bird.jpg").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="a device, not a file"):
        open_picture(tmp_path / "bird.jpg")
    (tmp_path / "loop").symlink_to("loop")
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "none.jpg", FileNotFoundError),
        (tmp_path / "loop", OSError),
    ):
        with pytest.raises(error):
            open_picture(path)
    os.mkfifo(tmp_path / "pipe")
    for start, message in ((b"", "nothing but zeros"), (b"\xff\xd8\xff\xe0", "a file of more than 67,109,664 bytes")):
        command = ["sh", "-c", "(printf '%b' \"$0\"; cat /dev/zero) > pipe"]
        command.append("".join(f"\\0{byte:03o}" for byte in start))
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as endless:
            with pytest.raises(ValueError, match=message):
                open_picture(tmp_path / "pipe", max_pixels=100)
            endless.wait()


def test_a_long_file_that_is_no_picture_is_not_read(tmp_path):
    for start, message in ((b"\0\0\0\x20ftypisom", "a video"), (jpeg(), "a file of more than 67,109,664 bytes")):
        with open(tmp_path / "bird.jpg", "wb") as file:
            file.write(start)
            file.truncate(10**12)
        with pytest.raises(ValueError, match=message):
            open_picture(tmp_path / "bird.jpg", max_pixels=100)


def test_files_are_closed(tmp_path):
    for name, data in (("a", jpeg()), ("b", LOSSLESS["PNG"]()), ("c", LOSSLESS["TIFF, LZW"]()), ("d", b"text")):
        (tmp_path / name).write_bytes(data)
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    pictures = [open_picture(tmp_path / name) for name in "abc"]
    [picture.read() for picture in pictures]
    with pytest.raises(ValueError):
        open_picture(tmp_path / "d")
    assert before == (os.listdir("/proc/self/fd") if before else [])


def test_many_threads_read_at_once():
    broken = tiff_of(painted(), photometric=2, more=[(0x010F, 2, 10**6, struct.pack("<I", 10**6))])
    sources = [jpeg(), broken, LOSSLESS["PNG"](), jpeg()[:-2], AS_PILLOW["GIF"](), AS_PILLOW["AVIF"]()]
    expected = [read(source) for source in sources]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, pixels in zip(pool.map(read, sources * 8), expected * 8, strict=True):
                assert (found == pixels).all()


# Pictures in memory


def test_arrays():
    pixels = painted()
    for array, expected in (
        (pixels, pixels),
        (pixels[::-1, ::2], pixels[::-1, ::2]),
        (np.asfortranarray(pixels), pixels),
        (pixels[..., 0], np.repeat(pixels[..., :1], 3, axis=2)),
        (pixels[..., :1], np.repeat(pixels[..., :1], 3, axis=2)),
        (np.dstack([pixels, pixels[..., 0]]), pixels),
    ):
        picture = open_picture(array)
        assert (picture.kind, picture.orientation, picture.size) == ("array", 1, array.shape[1::-1])
        assert (read(array) == expected).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((3, 40, 50), np.uint8),
        np.zeros(4, np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match=r"an array of .*: expected uint8 \(height, width, 3\)"):
        open_picture(array)


def test_an_empty_array_is_refused():
    with pytest.raises(ValueError, match="0x4 pixels"):
        open_picture(np.zeros((4, 0, 3), np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, at its end", "WEBP", "TIFF", "AVIF"])
def test_an_image_of_pillows_gives_what_its_file_gives(kind):
    data = container(kind, stored_for(6), exif(6))
    with Image.open(io.BytesIO(data)) as image:
        assert (read(image) == read(data)).all()
        assert image.getpixel((0, 0))  # still open


def test_images_of_pillows():
    image = Image.fromarray(painted())
    assert (read(image) == painted()).all()
    image.getexif()[0x0112] = 6
    assert open_picture(image).size == (48, 72) and (read(image) == np.rot90(painted(), 3)).all()
    for mode in ("L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"):
        converted = (
            Image.fromarray(painted()).convert("L").convert(mode)
            if mode == "I;16"
            else Image.fromarray(painted()).convert(mode)
        )
        assert read(converted).shape == (48, 72, 3)
    with Image.open(io.BytesIO(with_exif(LOSSLESS["PNG"](), "PNG", NONSENSE["eight bytes"]))) as broken:
        assert (read(broken) == painted()).all()
    with Image.open(io.BytesIO(LOSSLESS["PNG"]()[:-200])) as cut, pytest.raises(ValueError, match="a truncated PNG"):
        read(cut)
    with pytest.raises(ValueError, match="convert it to 8"):
        read(image.convert("F"))
    with pytest.raises(ValueError, match="^a picture in LAB colours: convert it to RGB"):
        read(Image.new("LAB", (9, 9)))


# Commands


@pytest.fixture
def ghostscript(tmp_path):
    """The environment of a machine that has Ghostscript, and the file that says that it was started."""
    program, started = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}, started


def test_predict_leaves_postscript_alone_whatever_its_name(main, hf_folder, tmp_path, ghostscript):
    environment, started = ghostscript
    (tmp_path / "bird.jpg").write_bytes(POSTSCRIPT)
    done = main("predict", f"--model={hf_folder}", "--images=bird.jpg", "--out=birds.csv", env=environment)
    assert done.returncode == 1 and not started.exists()
    assert "not a picture in one of the formats AVIF, BMP" in pl.read_csv(tmp_path / "birds.csv")["problem"][0]


def test_prepare_and_train_leave_postscript_alone(main, prepared, tmp_path, ghostscript):
    environment, started = ghostscript
    draw_archive(tmp_path / "archive", species=2, train=2, test=1, size=(40, 60))
    next((tmp_path / "archive" / "images").rglob("*.jpg")).write_bytes(POSTSCRIPT)
    done = main("prepare", "--archive=archive", "--out=out", env=environment)
    assert done.returncode == 1 and "not a picture in one of the formats" in done.stderr
    birds = shutil.copytree(prepared, tmp_path / "birds")
    next((birds / "cleaned_images").rglob("*.jpg")).write_bytes(POSTSCRIPT)
    done = main(*main.tiny, f"--config.data.root={birds}", "--workdir=run", env=environment)
    assert done.returncode == 1 and "cannot be read" in done.stderr
    assert not started.exists()
