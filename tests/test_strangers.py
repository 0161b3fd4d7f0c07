"""What strangers' files could do: run as code, hang, fill the memory, leave their folder, steer a terminal."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vit_nabirds.commands.predict import find_images, write_rows, write_table
from vit_nabirds.data import foreign, jpeg, taxonomy
from vit_nabirds.data.archives import folders, read_archive
from vit_nabirds.data.boxes import read_boxes
from vit_nabirds.data.images import PackedImages
from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.pictures import open_picture
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.table import left_out_of, read_table, settings_of
from vit_nabirds.data.taxonomy import read_taxonomy
from vit_nabirds.errors import ConfigError, UserError, quoted

FILES = {
    "images": ["u-1 a/1.jpg", "u-2 a/2.jpg", "u-3 b/3.jpg", "u-4 b/4.jpg"],
    "image_class_labels": ["u-1 1", "u-2 1", "u-3 2", "u-4 2"],
    "bounding_boxes": ["u-1 0 0 9 9", "u-2 0 0 9 9", "u-3 0 0 9 9", "u-4 0 0 9 9"],
    "sizes": ["u-1 40 30", "u-2 40 30", "u-3 40 30", "u-4 40 30"],
    "photographers": ["u-1 Ada", "u-2 Bo", "u-3 Ada", "u-4 Bo"],
    "train_test_split": ["u-1 1", "u-2 0", "u-3 1", "u-4 0"],
    "classes": ["0 Birds", "1 Teal", "2 Wren"],
    "hierarchy": ["1 0", "2 0"],
}


def picture(**options) -> bytes:
    Image.new("RGB", (40, 30), "teal").save(buffer := io.BytesIO(), "JPEG", **options)
    return buffer.getvalue()


def nabirds(folder: Path, **changed: list[str]) -> Path:
    for name, rows in (FILES | changed).items():
        (folder / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    for row in FILES["images"]:
        file = folder / "images" / row.split()[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture())
    return folder


def prepared(folder: Path, **options) -> Path:
    prepare(nabirds(folder / "archive"), folder / "out", train_size=20, test_size=16, **options)
    return folder / "out"


def message_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert len(message) < 2000 and message.replace("\n", "").isprintable()
    return message


# Numbers and text


@pytest.mark.parametrize(
    "number", ["٣49", "１2", "1_000", "1e3", "+5", "nan", "inf", "1\u00a00", "99999999999", "0x10"]
)
def test_only_ascii_digits_are_numbers_of_an_archive(tmp_path, number):
    for name, row in (("sizes", f"u-4 {number} 30"), ("bounding_boxes", f"u-4 0 0 {number} 9")):
        folder = nabirds(tmp_path, **{name: [*FILES[name][:3], row]})
        assert f"{name}.txt, row 4: 'u-4 " in message_of(read_archive, folder)


@pytest.mark.parametrize("number", ["٣49", "1_000", "nan", "inf", "1e400", "1e30", "", "0x10", "\0"])
def test_only_ascii_numbers_are_boxes(tmp_path, number):
    (tmp_path / "b.csv").write_text(f"file,bb_x,bb_y,bb_width,bb_height\na.jpg,1,2,{number},4\n")
    assert "b.csv, row 2: expected file, bb_x" in message_of(read_boxes, tmp_path / "b.csv")
    (tmp_path / "images.txt").write_text("1 a.jpg\n")
    (tmp_path / "boxes.txt").write_text("1 1 2 3 4\n")
    (tmp_path / "sizes.txt").write_text(f"1 {number} 40\n")
    assert "sizes.txt, row 1: expected <id> <width> <height>" in message_of(read_boxes, tmp_path / "boxes.txt")


@pytest.mark.parametrize("value", [True, None, "٣", "1_0", 10**400, float("nan"), [1], {}])
def test_boxes_in_json_are_numbers(tmp_path, value):
    images, boxes = [{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "bbox": [1, 2, value, 4]}]
    (tmp_path / "b.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    assert "annotations[0]: expected " in message_of(read_boxes, tmp_path / "b.json")


@pytest.mark.parametrize(
    "bbox", [[[[], {}], 2, 30, 40], [True, "x", 1, 2], [10**400, 1, 1, 1], [1e300, 1, 2, 2], "1 2"]
)
def test_boxes_in_coco_are_numbers(tmp_path, bbox):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 1, "bbox": bbox}],
        "categories": [{"id": 1, "name": "Teal"}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert "annotations[0]: " in message_of(read_archive, tmp_path / "a.json")


def test_a_failure_of_a_detector_is_text(tmp_path):
    deep = json.loads("[" * 900 + "]" * 900)
    (tmp_path / "b.json").write_text(json.dumps({"images": [{"file": "a.jpg", "failure": deep}]}))
    assert "images[0]: expected " in message_of(read_boxes, tmp_path / "b.json")


def test_a_message_quotes_a_long_or_steering_line_in_short(tmp_path):
    line = "u-4 \x1b[31m\u202e" + "x" * 10_000_000
    message = message_of(read_archive, nabirds(tmp_path, sizes=[*FILES["sizes"][:3], line]))
    assert r"sizes.txt, row 4: 'u-4 \x1b[31m\u202exxx" in message and "…' is not of the form" in message
    assert quoted("a\nb\ud800", 9) == r"a\nb\ud8…" and quoted("é \\") == "é \\"


@pytest.mark.parametrize("end", ["\r", "\n,", '\n"'])
def test_odd_line_ends_in_the_names_of_columns(tmp_path, end):
    (tmp_path / "a.csv").write_bytes(f"path,la{end}bel\na,b\n".encode())
    assert "a.csv" in message_of(read_archive, tmp_path / "a.csv")


def test_a_column_name_of_a_megabyte_is_no_traceback(tmp_path):
    (tmp_path / "a.csv").write_text("path," + "x" * 2**20 + "\na.jpg,b\n")
    assert "a.csv, row 1: field larger than field limit" in message_of(read_archive, tmp_path / "a.csv")


# Tables


def test_columns_may_have_the_names_of_the_programs_own(tmp_path):
    own = "row file blank name size boxed label class_name split index missing node species_name".split()
    table = pl.read_csv(b"path,label\na.jpg,Teal\nb.jpg,Wren\nc.jpg,Teal\nd.jpg,Wren\n").with_columns(
        pl.lit("x").alias(name) for name in own if name not in ("label", "file", "split", "class_name", "species_name")
    )
    table.write_parquet(tmp_path / "a.parquet")
    table.write_csv(tmp_path / "a.csv")
    for name in ("a.parquet", "a.csv"):
        assert read_archive(tmp_path / name, test_share=0.5).table.height == 4
    file = prepared(tmp_path) / "metadata.parquet"
    known = pl.read_parquet(file)
    known.with_columns(pl.lit("x").alias(name) for name in own if name not in known.columns).write_parquet(file)
    assert read_table(tmp_path / "out").height == 4


def test_durations_are_no_labels(tmp_path):
    table = pl.DataFrame({"path": ["a.jpg"], "label": pl.Series([1], dtype=pl.Duration)})
    table.write_parquet(tmp_path / "a.parquet")
    assert "column label holds Duration" in message_of(read_archive, tmp_path / "a.parquet")


WRONG = {
    "is_training_img": (pl.Series([0.9, 1, 0, 0]), "is_training_img has fractions"),
    "path": (pl.Series(["../../etc/passwd", "b", "c", "d"]), r"row 0 (../../etc/passwd) has a path that leads out"),
    "crc32": (pl.Series([None, 1, 2, 3], dtype=pl.UInt32), "row 0 (a/1.jpg) has no crc32"),
    "source": (pl.Series([None, "b", "c", "d"]), "row 0 (a/1.jpg) has an empty source"),
    "bird_x": (pl.Series([-1] * 4), "a bird outside of its image"),
    "bird_width": (pl.Series([2**31 - 1] * 4), "a bird outside of its image"),
    "bird_height": (pl.Series([0] * 4), "a bird outside of its image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_of_metadata_are_named(tmp_path, name):
    file = prepared(tmp_path) / "metadata.parquet"
    values, message = WRONG[name]
    pl.read_parquet(file).with_columns(values.alias(name)).write_parquet(file)

    def use():
        table = read_table(tmp_path / "out")
        open_split(tmp_path / "out", table.with_columns(split=pl.lit("validation")), "validation")

    assert message in message_of(use)


def test_a_part_of_a_birds_place_is_no_place(tmp_path):
    file = prepared(tmp_path) / "metadata.parquet"
    pl.read_parquet(file).drop("bird_height").write_parquet(file)
    assert "metadata.parquet has no column 'bird_height'" in message_of(read_table, tmp_path / "out")


def test_rows_without_bytes_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "MOST_ROWS", 999)
    file = tmp_path / "a.parquet"
    pl.select(path=pl.repeat("a.jpg", 1000), label=pl.repeat("Teal", 1000)).write_parquet(file)
    assert "1,000 rows, more than the 999 that are read" in message_of(read_archive, file)


@pytest.mark.parametrize("text", ["nine", "-1", "٣", "9" * 5000, "1_0"])
def test_a_nonsensical_count_of_skipped_photographs_is_none(tmp_path, text):
    pl.DataFrame({"path": ["a"]}).write_parquet(tmp_path / "metadata.parquet", metadata={"skipped": text})
    assert left_out_of(tmp_path) == 0


@pytest.mark.parametrize("content", [b"[" * 99_999, b"\xff", b"[1]", b'{"a": 1' + b"0" * 5000 + b"}", b" " * 2**21])
def test_a_strange_prepared_json_is_a_message(tmp_path, content):
    root = prepared(tmp_path)
    (root / "prepared.json").write_bytes(content)
    assert "prepared.json" in message_of(settings_of, root)
    assert "prepared.json" in message_of(prepare, tmp_path / "archive", root, train_size=20, test_size=16)


@pytest.mark.parametrize("size", [True, 10**9, -1, "20", [20], 1.5])
def test_a_strange_size_of_images_is_a_message(tmp_path, size):
    root = prepared(tmp_path)
    (root / "prepared.json").write_text(json.dumps({"train_size": size, "test_size": 16}))
    assert "prepared.json has train_size " in message_of(open_split, root, read_table(root), "train")


def test_a_size_that_no_image_has_is_wrong_usage(tmp_path):
    with pytest.raises(ConfigError, match="at most 16,384"):
        prepare(tmp_path, tmp_path / "out", train_size=10**6)


def test_a_tree_deeper_than_any_of_living_things_is_refused(tmp_path):
    chain = [f"{n} {n + 1}" for n in range(1, 2000)]
    names = ["0 Birds", *(f"{n} Class {n}" for n in range(1, 2001))]
    message = message_of(read_archive, nabirds(tmp_path, classes=names, hierarchy=[*chain, "2000 0"]))
    assert f"does not descend from a root in {taxonomy.DEEPEST} steps" in message


def test_a_class_outside_of_the_tree_is_refused(tmp_path):
    root = prepared(tmp_path)
    (root / "classes.txt").write_text("0 Birds\n1 Teal\n")
    assert "does not fit metadata.parquet (2 is not in classes.txt)" in message_of(
        read_taxonomy, root, read_table(root)
    )


# Files that are none, or endless, or lead away


def hold(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def never_end(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def fill(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize("spoil", [hold, never_end, fill])
def test_files_that_never_end_are_not_read(tmp_path, spoil):
    root = prepared(tmp_path, pack=True)
    for name in ("packed/train.npy", "hierarchy.txt", "classes.txt", "prepared.json", "metadata.parquet"):
        before = (root / name).read_bytes()
        spoil(root / name)

        def use():
            table = read_table(root)
            read_taxonomy(root, table)
            open_split(root, table, "train")

        if (name, spoil) not in [("hierarchy.txt", hold), ("hierarchy.txt", never_end)]:  # is no tree, then
            assert name in message_of(use)
        (root / name).unlink()
        (root / name).write_bytes(before)
    for name in ("b.csv", "b.json", "images.txt", "sizes.txt"):
        (tmp_path / "boxes.txt").write_text("1 1 2 3 4\n")
        (tmp_path / "images.txt").write_text("1 a.jpg\n")
        spoil(tmp_path / name)
        assert name in message_of(read_boxes, tmp_path / (name if name.startswith("b.") else "boxes.txt"))
        (tmp_path / name).unlink()


def test_photographs_that_never_end_or_lie_elsewhere_are_named(tmp_path):
    archive = nabirds(tmp_path / "archive")
    (tmp_path / "secret.jpg").write_bytes(picture())
    hold(archive / "images/a/1.jpg")
    never_end(archive / "images/a/2.jpg")
    (archive / "images/b/3.jpg").unlink()
    (archive / "images/b/3.jpg").symlink_to(tmp_path / "secret.jpg")
    message = message_of(prepare, archive, tmp_path / "out", train_size=20, test_size=16)
    for name, reason in (("a/1", "not a regular file"), ("a/2", "a link out of"), ("b/3", "a link out of")):
        assert f"{name}.jpg: {reason}" in message
    assert message.startswith("3 photographs cannot be used")


def test_links_inside_of_the_archive_and_to_it_are_followed(tmp_path):
    archive = nabirds(tmp_path / "archive")
    (archive / "images/b").rename(archive / "images/c")
    (archive / "images/b").symlink_to("c")
    (archive / "images/a/1.jpg").rename(archive / "images/a/real")
    (archive / "images/a/1.jpg").symlink_to(archive / "images/a/real")
    (archive / "images").rename(tmp_path / "elsewhere")
    (archive / "images").symlink_to(tmp_path / "elsewhere")
    (archive / "images/a/1.jpg").unlink()
    (archive / "images/a/1.jpg").symlink_to(tmp_path / "elsewhere/a/real")
    (tmp_path / "link").symlink_to(archive)
    prepare(tmp_path / "link", tmp_path / "out", train_size=20, test_size=16)
    (tmp_path / "out/cleaned_images").rename(tmp_path / "images")
    (tmp_path / "out/cleaned_images").symlink_to(tmp_path / "images")
    split = open_split(tmp_path / "out", read_table(tmp_path / "out"), "train")
    split.read(0, np.empty((20, 20, 3), np.uint8))


def test_no_image_is_read_or_written_through_a_link_that_leads_away(tmp_path):
    root = prepared(tmp_path).rename(tmp_path / "moved")
    split = open_split(root, read_table(root), "train")
    (root / "cleaned_images/a").rename(tmp_path / "a")
    (root / "cleaned_images/a").symlink_to(tmp_path / "a")
    assert "through a link" in message_of(split.read, 0, np.empty((20, 20, 3), np.uint8))
    (root / "metadata.parquet").unlink()
    assert "a: a link out of" in message_of(prepare, tmp_path / "archive", root, train_size=20, test_size=16)


def test_links_from_folder_to_folder_do_not_multiply_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_MOST_FOLDERS", 1000)
    for level in range(30):
        (tmp_path / f"{level}").mkdir()
        if level:
            for name in ("x", "y"):
                (tmp_path / f"{level - 1}" / name).symlink_to(tmp_path / f"{level}")
    assert "more than 1,000 folders" in message_of(read_archive, tmp_path)


def test_folders_in_folders_without_end_are_not_looked_into(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):
        os.mkdir("a")
        os.chdir("a")
    os.chdir(tmp_path)
    assert "too deep" in message_of(read_archive, tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "a"], check=True)  # too deep for pytest, too


def test_the_only_folder_in_an_archive_may_have_any_name(tmp_path):
    nabirds(tmp_path / "data" / "\x1b[2J", sizes=["u-1 1"])
    assert r"\x1b[2J/sizes.txt, row 1" in message_of(read_archive, tmp_path / "data")


# Code and commands


def test_the_header_of_a_pack_is_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", None)
    paths, crc32 = pl.Series(["a.jpg"] * 2), np.zeros(2, np.uint32)
    np.save(tmp_path / "train.npy", images := np.zeros((2, 20, 20, 3), np.uint8))
    pack = PackedImages(tmp_path / "train.npy", paths, crc32)
    assert (pack.size, pack.offset) == (20, (tmp_path / "train.npy").stat().st_size - images.nbytes)
    for shape in ("(2, 20, 20, 3, )", "(1+1, 20, 20, 3)", "(" * 60, "(2, 20, 20, 3), 'x': 0", "(٢, 20, 20, 3)"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        header = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
        (tmp_path / "train.npy").write_bytes(header + images.tobytes())
        assert "its header is not that of a pack" in message_of(PackedImages, tmp_path / "train.npy", paths, crc32)


FORMULAS = ["=cmd|' /C calc'!A0", "@SUM(A1)", "+1", "-1", "\t=1", "\r=1", "＝1"]


def test_no_cell_of_a_csv_is_a_formula(tmp_path):
    answers = [
        {
            "file": text,
            "box": (-1, 2, 3, 4),
            "species": [text, "Teal"],
            "probability": [0.5, float("nan")],
            "problem": "",
        }
        for text in FORMULAS
    ]
    write_rows(answers, tmp_path / "rows")
    exact = pl.read_parquet(write_table(tmp_path / "rows", ".parquet"))
    assert exact["species"].to_list()[::2] == FORMULAS == exact["file"].to_list()[::2]
    assert exact["probability"].to_list()[:2] == [0.5, None]
    table = pl.read_csv(write_table(tmp_path / "rows", ".csv"), infer_schema=False)
    assert table["species"].to_list()[::2] == ["'" + text for text in FORMULAS]
    assert table["species"][1] == "Teal" and table["box"][0] == "-1 2 3 4"


def test_skipped_photographs_with_names_like_formulas_are_known_again(tmp_path, capsys):
    out, tmp_path = tmp_path / "out", tmp_path / "data"
    tmp_path.mkdir()
    text = "path,label,split\n" + "".join(f"{n}.jpg,{'TW'[n % 2]},{('train', 'test')[n > 3]}\n" for n in range(8))
    (tmp_path / "a.csv").write_text(text + "=1.jpg,T,train\n")
    for n in range(8):
        (tmp_path / f"{n}.jpg").write_bytes(picture())
    options = dict(train_size=20, test_size=16, on_error="skip", max_skipped=0.5, pack=True)
    for outcome in ("written in", "already there"):
        prepare(tmp_path / "a.csv", out, **options)
        assert outcome in capsys.readouterr().out.splitlines()[-1]
    assert (out / "skipped.csv").read_text() == "source,reason\n'=1.jpg,no such file\n"


def test_names_of_files_do_not_reach_the_terminal_as_they_are(tmp_path):
    (tmp_path / "a.\x1b[2J\u202e").write_text("no picture")
    for number in range(30):
        (tmp_path / f"a.{number}").write_text("no picture")
    message = message_of(find_images, tmp_path)
    assert "and 11 other kinds" in message
    (tmp_path / "data/train/\x1b[2J").mkdir(parents=True)
    (tmp_path / "data/train/Teal").mkdir()
    (tmp_path / "data/train/\x1b[2J/1.jpg").write_bytes(b"-")
    (tmp_path / "data/train/Teal/1.jpg").write_bytes(b"-")
    message = message_of(prepare, tmp_path / "data", tmp_path / "out", test_share=0.5)
    assert "\\x1b[2J/1.jpg: " in message or "test_share" in message


# Pictures


def test_a_jpeg_of_more_scans_than_any_program_writes_is_not_decoded():
    data = picture(progressive=True)
    header = jpeg.read_header(data)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    many = data[:-2] + scan * 200 + b"\xff\xd9"
    with pytest.raises(ValueError, match=r"a JPEG with 2\d\d scans, more than any program writes"):
        open_picture(many).read()
    assert header.size == (40, 30) and open_picture(data).read().shape == (30, 40, 3)


CLAIMS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from vit_nabirds.data.pictures import open_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        open_picture(name).read()
        print("read", name)
    except ValueError as error:
        print(name, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def huge() -> dict[str, bytes]:
    """Whole small pictures that say that they have 16,383 or 22,000 pixels a side, with nothing missing."""
    found = {}
    for name, kind, options in (
        ("e.webp", "WEBP", {}),
        ("f.webp", "WEBP", {"lossless": True}),
        ("g.jp2", "JPEG2000", {}),
        ("h.tif", "TIFF", {"compression": "tiff_lzw"}),
    ):
        Image.new("RGB", (64, 48), "teal").save(buffer := io.BytesIO(), kind, **options)
        found[name] = bytearray(buffer.getvalue())
    at = found["e.webp"].index(b"\x9d\x01\x2a") + 3
    struct.pack_into("<HH", found["e.webp"], at, 16_383, 16_383)
    at = found["f.webp"].index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", found["f.webp"], at)
    struct.pack_into("<I", found["f.webp"], at, bits & ~0xFFFFFFF | 16_382 << 14 | 16_382)
    at = found["g.jp2"].index(b"\xff\x51")
    for place in (at + 6, at + 22, found["g.jp2"].index(b"ihdr") + 4):  # the picture, its only tile, and the box around
        struct.pack_into(">II", found["g.jp2"], place, 22_000, 22_000)
    (at,) = struct.unpack_from("<I", found["h.tif"], 4)
    for entry in range(at + 2, at + 2 + 12 * found["h.tif"][at], 12):
        if found["h.tif"][entry : entry + 2] in (b"\0\1", b"\1\1", b"\x16\1"):  # width, height, rows of a strip
            struct.pack_into("<HII", found["h.tif"], entry + 2, 4, 1, 22_000)
    return found


def test_a_few_bytes_that_claim_many_pixels_take_no_memory(tmp_path):
    plain = picture()
    size = plain.index(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes((plain[:size] + struct.pack(">HH", 65_500, 65_500) + plain[size + 4 :])[:150])
    (tmp_path / "b.jpg").write_bytes(plain[:size] + struct.pack(">HH", 22_000, 22_000) + plain[size + 4 :])
    (tmp_path / "c.bmp").write_bytes(
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 150, 0, 0, 54, 40, 22_000, 22_000, 1, 24, 0, 0, 1, 1, 0, 0) + bytes(96)
    )
    (tmp_path / "d.ppm").write_bytes(b"P6 22000 22000 255\n" + bytes(130))
    names = ["a.jpg", "b.jpg", "c.bmp", "d.ppm"]
    for name, data in huge().items():
        (tmp_path / name).write_bytes(data)
        names.append(name)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", CLAIMS, *names], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    *lines, megabytes = done.stdout.splitlines()
    assert len(lines) == len(names) and not any(line.startswith("read") for line in lines), done.stderr
    assert int(megabytes) < 100, done.stdout
