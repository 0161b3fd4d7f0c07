"""Preparing an archive: geometry, odd files, broken files, interruption, reruns."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vit_nabirds.data.archives import read_archive
from vit_nabirds.data.pictures import Picture
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.locks import lock

RED, GREEN, BLUE, GREY, BLACK = (220, 40, 40), (40, 180, 60), (40, 60, 200), (128, 128, 128), (0, 0, 0)


def archive_of(folder: Path, *photographs: tuple) -> Path:
    """An archive of (file name, image, box, is train) with two species; `image` may be the bytes of a file."""
    (folder / "images/0295").mkdir(parents=True)
    files = {"classes": ["0 Birds", "295 Robin (Adult )"], "hierarchy": ["295 0"]}
    for index, (name, image, box, train) in enumerate(photographs):
        path, size = folder / "images/0295" / name, (100, 80)
        if isinstance(image, bytes):
            path.write_bytes(image)
        elif image is not None:
            size = image.size
            image.save(path, "PNG" if image.mode in ("RGBA", "P", "LA") else "JPEG", quality=98, subsampling=0)
        rows = {
            "images": f"0295/{name}",
            "image_class_labels": "295",
            "bounding_boxes": " ".join(map(str, box)),
            "sizes": f"{size[0]} {size[1]}",
            "photographers": "Ada",
            "train_test_split": int(train),
        }
        for file, value in rows.items():
            files.setdefault(file, []).append(f"u-{index} {value}")
    for file, lines in files.items():
        (folder / f"{file}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def painted(width: int, height: int, *boxes: tuple) -> Image.Image:
    """A grey photograph with (left, top, width, height, colour) painted on it in turn."""
    image = Image.new("RGB", (width, height), GREY)
    for left, top, across, down, colour in boxes:
        image.paste(colour, (left, top, left + across, top + down))
    return image


def jpeg(image: Image.Image, tmp_path: Path, **options) -> bytes:
    image.save(tmp_path / "x.jpg", **options)
    return (tmp_path / "x.jpg").read_bytes()


def rows_of(out: Path) -> pl.DataFrame:
    """metadata.parquet as the archive's own files have it."""
    columns = read_archive(out.parent / "a").table.drop("width", "height").columns
    return pl.read_parquet(out / "metadata.parquet")[columns]


def pixels_of(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def assert_colour(image: np.ndarray, x: int, y: int, colour: tuple) -> None:
    assert np.abs(image[y, x].astype(int) - colour).max() <= 12, (x, y, image[y, x], colour)


def test_training_images_have_a_margin_and_all_are_centred_on_black(tmp_path):
    # 20 % of 80 x 40 is 16 x 8: the red ring is exactly the margin, blue is the bird, grey must not be seen
    bird = painted(200, 100, (34, 22, 112, 56, RED), (50, 30, 80, 40, BLUE))
    archive = archive_of(tmp_path / "a", ("a.jpg", bird, (50, 30, 80, 40), 1), ("b.jpg", bird, (50, 30, 80, 40), 0))
    prepare(archive, tmp_path / "p", train_size=112, test_size=64)
    train = pixels_of(tmp_path / "p/cleaned_images/0295/a.jpg")
    assert train.shape == (112, 112, 3)
    for x, y, colour in [
        (56, 24, BLACK),
        (56, 31, RED),
        (56, 39, BLUE),
        (3, 56, RED),
        (12, 56, RED),
        (19, 56, BLUE),
    ] + [(93, 56, BLUE), (108, 56, RED), (56, 73, BLUE), (56, 80, RED), (56, 88, BLACK)]:
        assert_colour(train, x, y, colour)
    test = pixels_of(tmp_path / "p/cleaned_images/0295/b.jpg")
    assert test.shape == (64, 64, 3)
    for x, y, colour in [
        (32, 12, BLACK),
        (32, 19, BLUE),
        (2, 32, BLUE),
        (61, 32, BLUE),
        (32, 44, BLUE),
        (32, 51, BLACK),
    ]:
        assert_colour(test, x, y, colour)


def test_margins_and_boxes_end_at_the_edge_of_the_image(tmp_path):
    corner = painted(100, 80, (0, 0, 50, 50, GREEN))
    sticking_out = (-40, -40, 80, 80)  # its part inside is 40 x 40, with margin 48 x 48
    archive = archive_of(tmp_path / "a", ("a.jpg", corner, sticking_out, 1), ("b.jpg", corner, sticking_out, 0))
    prepare(archive, tmp_path / "p", train_size=96, test_size=80)
    for name, side in (("a", 96), ("b", 80)):
        image = pixels_of(tmp_path / f"p/cleaned_images/0295/{name}.jpg")
        assert image.shape == (side, side, 3)
        for at in (2, side // 2, side - 3):
            assert_colour(image, at, at, GREEN)


def test_shrinking_averages_pixels_instead_of_skipping_them(tmp_path):
    noise = np.random.default_rng(0).choice([0, 255], (400, 400)).astype(np.uint8)
    noise = Image.fromarray(noise).convert("RGB")
    archive = archive_of(tmp_path / "a", ("a.jpg", noise, (0, 0, 400, 400), 1), ("b.jpg", noise, (0, 0, 400, 400), 0))
    prepare(archive, tmp_path / "p", test_size=100)
    # The mean of 4 x 4 such pixels deviates from 127 by 127 / 4; the one in the middle would by 127.
    assert pixels_of(tmp_path / "p/cleaned_images/0295/b.jpg").std() < 36


def test_every_kind_of_picture_is_prepared_from_its_pixels(tmp_path, capsys):
    photograph = painted(60, 40, (0, 0, 30, 40, RED), (30, 0, 30, 40, BLUE))
    transparent = photograph.convert("RGBA")
    transparent.putalpha(255)
    box, grey = (0, 0, 60, 40), photograph.convert("L")
    files = [
        ("plain.JPG", photograph, box, 1),
        ("png.jpg", transparent, box, 0),
        ("palette.jpg", photograph.quantize(8), box, 0),
        ("cmyk.jpg", photograph.convert("CMYK"), box, 0),
        ("grey.jpg", grey, box, 0),
    ]
    archive = archive_of(tmp_path / "a", *files)
    prepare(archive, tmp_path / "p", train_size=60, test_size=60)
    for name, *_ in files[:-1]:
        file = tmp_path / "p/cleaned_images/0295" / name
        assert file.read_bytes()[:3] == b"\xff\xd8\xff", f"{name} is not a JPEG"
        image = pixels_of(file)
        assert image.shape == (60, 60, 3), name
        assert_colour(image, 10, 30, RED)
        assert_colour(image, 50, 30, BLUE)
        assert_colour(image, 30, 5, BLACK)
    image = pixels_of(tmp_path / "p/cleaned_images/0295/grey.jpg")
    assert_colour(image, 10, 30, (grey.getpixel((10, 20)),) * 3)
    assert "2 files are not JPEG" in capsys.readouterr().out


# Where the red left half of a 60 x 40 photograph is once it is upright: a side, for each EXIF orientation.
SIDES = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
CORNERS = {"left": (8, 20), "right": (52, 20), "top": (20, 8), "bottom": (20, 52)}


@pytest.mark.parametrize("frame", ["stored", "upright", "neither"])
@pytest.mark.parametrize("orientation", SIDES)
def test_boxes_follow_the_orientation_in_the_frame_that_the_sizes_state(tmp_path, capsys, orientation, frame):
    """The box is the red half. What comes out is upright. Where nothing tells the frame, boxes are upright too."""
    photograph, exif = painted(60, 40, (0, 0, 30, 40, RED), (30, 0, 30, 40, BLUE)), Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photograph, tmp_path, exif=exif, quality=98, subsampling=0)
    swapped, side = orientation > 4, SIDES[orientation]
    halves = {"left": (0, 0, 30, 40), "right": (30, 0, 30, 40), "top": (0, 0, 40, 30), "bottom": (0, 30, 40, 30)}
    box = halves["left" if frame == "stored" and swapped else side]
    archive = archive_of(tmp_path / "a", ("a.jpg", data, box, 1), ("b.jpg", data, box, 0))
    sizes = {"stored": "60 40", "upright": "40 60" if swapped else "60 40", "neither": "70 70"}[frame]
    (archive / "sizes.txt").write_text(f"u-0 {sizes}\nu-1 {sizes}\n")
    prepare(archive, tmp_path / "p", train_size=100, test_size=40, margin=1)
    test, train = (pixels_of(tmp_path / "p/cleaned_images/0295" / name) for name in ("b.jpg", "a.jpg"))
    for x, y in ((14, 20), (20, 14), (26, 20), (20, 26)):
        assert_colour(test, x, y, RED)
    x, y = (round(at * 100 / 60) for at in CORNERS[side])  # the whole photograph, in a square of 100
    assert_colour(train, x + 17 * swapped, y + 17 * (not swapped), RED)
    row = pl.read_parquet(tmp_path / "p/metadata.parquet").row(0, named=True)
    assert (row["width"], row["height"]) == ((40, 60) if swapped else (60, 40))
    assert tuple(row[f"bb_{name}"] for name in ("x", "y", "width", "height")) == halves[side]
    output = capsys.readouterr().out
    is_open = orientation in (2, 3, 4) or (orientation in (5, 6) and frame == "neither")  # (0, 30, 40, 30) fits one
    assert ("nothing says if their boxes are" in output) == is_open
    assert ("not of the stated size" in output) == (frame == "neither")


def test_broken_photographs_are_listed_at_the_end_and_a_rerun_completes(tmp_path, capsys):
    good = painted(100, 80, (20, 20, 40, 40, RED))
    whole = jpeg(good, tmp_path, quality=95)
    box = (20, 20, 40, 40)
    archive = archive_of(
        tmp_path / "a",
        ("good.jpg", good, box, 1),
        ("cut.jpg", whole[: len(whole) // 2], box, 0),
        ("cut_with_end.jpg", whole[: len(whole) // 2] + b"\xff\xd9", box, 0),
        ("text.jpg", b"<html>404</html>", box, 0),
        ("empty.jpg", b"", box, 0),
        ("small.jpg", jpeg(painted(10, 10), tmp_path), box, 1),
    )
    out = tmp_path / "p"
    with pytest.raises(UserError, match="5 photographs cannot be used") as error:
        prepare(archive, out)
    for name in ("cut.jpg", "cut_with_end.jpg", "text.jpg", "empty.jpg", "small.jpg"):
        assert f"0295/{name}: " in str(error.value)
    assert "outside its real 10x10 pixels" in str(error.value)
    assert [file.name for file in (out / "cleaned_images/0295").iterdir()] == ["good.jpg"]
    assert not (out / "metadata.parquet").exists()

    for name in ("cut.jpg", "cut_with_end.jpg", "text.jpg", "empty.jpg", "small.jpg"):
        (archive / "images/0295" / name).write_bytes(whole)
    capsys.readouterr()
    prepare(archive, out)
    assert "5 written, 1 already there" in capsys.readouterr().out
    assert rows_of(out).equals(read_archive(archive).table.drop("width", "height"))


def test_missing_photographs_are_listed_with_the_damaged_ones(tmp_path):
    good = painted(100, 80)
    rows = [(f"{n:02}.jpg", good if n < 2 else None, (0, 0, 9, 9), n % 2) for n in range(14)]
    archive = archive_of(tmp_path / "a", *rows)
    (archive / "images/0295/01.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"13 photographs cannot be used") as error:
        prepare(archive, tmp_path / "p")
    assert all(f"/{n:02}.jpg: no such file" in str(error.value) for n in range(2, 14))
    assert "/01.jpg: an empty file" in str(error.value) and not (tmp_path / "p/metadata.parquet").exists()


def test_a_photograph_of_an_unexpected_size_is_used_and_counted(tmp_path, capsys):
    larger = jpeg(painted(300, 300, (90, 70, 10, 10, GREEN)), tmp_path, quality=98, subsampling=0)
    good = painted(100, 80)
    archive = archive_of(tmp_path / "a", ("a.jpg", larger, (90, 70, 10, 10), 0), ("b.jpg", good, (0, 0, 9, 9), 1))
    prepare(archive, tmp_path / "p")
    assert_colour(pixels_of(tmp_path / "p/cleaned_images/0295/a.jpg"), 112, 112, GREEN)
    assert "1 photographs are not of the stated size" in capsys.readouterr().out


@pytest.fixture(scope="module")
def painted_archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("painted") / "archive"
    draw_archive(folder, species=3, train=60, test=40)
    return folder


HELD = """
import itertools, os, signal, sys
from vit_nabirds.data import prepare

open_picture, count = prepare.open_picture, itertools.count()

def held(*arguments):
    if next(count) >= 20:
        os.read(0, 1)
    return open_picture(*arguments)

prepare.open_picture = held

def interrupt(*_):
    os.write(2, b"interrupted\\n")
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)  # a parent may have told it to ignore Ctrl-C
prepare.prepare(*sys.argv[1:])
"""


@pytest.fixture
def held_run(painted_archive, tmp_path):
    """A run that waits for a byte before each photograph from the 21st on."""
    out, command = tmp_path / "out", [sys.executable, "-c", HELD, painted_archive, tmp_path / "out"]
    options = dict(cwd=Path(__file__).parents[1], env=os.environ | {"SLURM_CPUS_PER_TASK": "1"}, bufsize=0)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        while len(list(out.glob("cleaned_images/*/*.jpg"))) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        yield process, out
        process.kill()


def test_a_rerun_after_kill_9_gives_what_an_undisturbed_run_gives(held_run, painted_archive, tmp_path):
    process, out = held_run
    process.kill()
    process.wait()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("cleaned_images/*/*.jpg")}
    assert len(finished) == 20
    assert not (out / "metadata.parquet").exists()
    # what a kill between writing and renaming leaves
    stale = next(iter(finished)).with_name("0123.jpg.partial")
    stale.write_bytes(b"\xff\xd8")

    prepare(painted_archive, out)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    prepare(painted_archive, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "lock"
    }


def test_ctrl_c_finishes_only_the_photograph_in_hand(held_run):
    process, out = held_run
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == b"interrupted\n"
    released = 0
    while process.poll() is None and released < 200:
        time.sleep(0.2)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"-")
        released += 1
    stderr = process.stderr.read()
    assert stderr.count(b"Traceback") == 1 and stderr.strip().endswith(b"KeyboardInterrupt")
    assert 1 <= len(list(out.glob("cleaned_images/*/*.jpg"))) - 20 <= released < 200
    assert not list(out.glob("cleaned_images/*/*.partial"))


def test_other_settings_or_another_archive_are_refused(painted_archive, tmp_path):
    first = archive_of(tmp_path / "a", *[(f"{n}.jpg", painted(100, 80), (5, 5, 50, 50), n) for n in (0, 1)])
    out = tmp_path / "p"
    prepare(first, out)
    before = contents(out)
    for changed, message in (
        ({"train_size": 256}, "made with train_size=269, not 256"),
        ({"test_size": 256}, "made with test_size=224, not 256"),
        ({"margin": 0.0}, "made with margin=0.2, not 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(first, out, **changed)
    with pytest.raises(UserError, match="images of another archive"):
        prepare(painted_archive, out)
    (first / "bounding_boxes.txt").write_text("u-0 5 5 50 50\nu-1 5 5 50 51\n")
    with pytest.raises(UserError, match="boxes or splits of this one have changed"):
        prepare(first, out)
    assert contents(out) == before
    (first / "bounding_boxes.txt").write_text("u-0 5 5 50 50\nu-1 5 5 50 50\n")
    (first / "photographers.txt").write_text("u-0 Ada\nu-1 Ada Lovelace\n")  # no pixel depends on it
    prepare(first, out)
    assert pl.read_parquet(out / "metadata.parquet")["photographer"].to_list() == ["Ada", "Ada Lovelace"]


def test_images_of_unknown_origin_are_refused(painted_archive, tmp_path):
    (tmp_path / "cleaned_images").mkdir()
    with pytest.raises(UserError, match=r"prepared.json: missing, or not written by"):
        prepare(painted_archive, tmp_path)
    (tmp_path / "prepared.json").write_text(json.dumps({"train_size": 269}))
    with pytest.raises(UserError, match=r"prepared.json: missing, or not written by"):
        prepare(painted_archive, tmp_path)


def test_metadata_only_needs_no_photographs_and_a_full_run_may_follow(tmp_path):
    photographs = [(f"{n}.jpg", painted(100, 80), (5, 5, 50, 50), n) for n in (0, 1)]
    archive, out = archive_of(tmp_path / "a", *photographs), tmp_path / "p"
    (archive / "images").rename(tmp_path / "elsewhere")
    prepare(archive, out, metadata_only=True)
    assert sorted(contents(out)) == ["classes.txt", "hierarchy.txt", "metadata.parquet"]
    assert rows_of(out).equals(read_archive(archive).table.drop("width", "height"))
    (tmp_path / "elsewhere").rename(archive / "images")
    prepare(archive, out)
    assert len(contents(out)) == 6

    # metadata.parquet marks the folder as complete: it is removed before an image is made again
    (out / "cleaned_images/0295/0.jpg").unlink()
    (archive / "images/0295/0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="1 photographs cannot be used"):
        prepare(archive, out)
    assert not (out / "metadata.parquet").exists()
    with pytest.raises(UserError, match="without --metadata_only"):
        prepare(archive, out, metadata_only=True)


@pytest.mark.parametrize(
    "changed",
    [{"train_size": 15}, {"test_size": 0}, {"margin": -0.1}, {"margin": 1.1}, {"margin": float("nan")}],
)
def test_invalid_arguments_are_refused_before_anything_is_written(painted_archive, tmp_path, changed):
    with pytest.raises(UserError, match=f"{next(iter(changed))} .*: give"):
        prepare(painted_archive, tmp_path / "p", **changed)
    assert not (tmp_path / "p").exists()


def test_out_must_not_be_a_file_or_the_images_of_the_archive(painted_archive, tmp_path):
    (tmp_path / "file").touch()
    for out in (painted_archive / "images", painted_archive / "images/new", tmp_path / "file"):
        with pytest.raises(UserError, match="Choose another --out"):
            prepare(painted_archive, out)
    assert not (painted_archive / "images/new").exists()
    with pytest.raises(UserError, match="Put that right or choose another --out"):
        prepare(painted_archive, tmp_path / "file/below")


def folders_of(folder: Path, **files: dict[str, bytes | Image.Image]) -> Path:
    """<split>/<class>/<file> with those contents."""
    for split, classes in files.items():
        for path, content in classes.items():
            file = folder / split / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content) if isinstance(content, bytes) else content.save(file)
    return folder


def test_skipping_accounts_for_every_photograph(tmp_path, capsys):
    whole = painted(60, 40, (0, 0, 30, 40, RED))
    train = {f"{name}/{n}.png": whole for name in ("jay", "wren") for n in range(20)}
    train |= {"jay/cut.jpg": jpeg(whole, tmp_path)[:300], "wren/page.jpg": b"<html>404</html>", "owl/gone.jpg": b""}
    archive = folders_of(tmp_path / "a", train=train, test={"jay/a.png": whole, "wren/b.png": whole})
    with pytest.raises(UserError, match="3 photographs cannot be used") as error:
        prepare(archive, tmp_path / "p", train_size=32, test_size=32)
    message = str(error.value)
    assert "cut.jpg: a truncated JPEG" in message and "page.jpg: an HTML page" in message
    assert "gone.jpg: an empty file" in message and "--on_error=skip" in message
    with pytest.raises(UserError, match=r"3 photographs cannot be used, more than max_skipped=0.05 of 45"):
        prepare(archive, tmp_path / "p", train_size=32, test_size=32, on_error="skip", max_skipped=0.05)
    assert not (tmp_path / "p/metadata.parquet").exists()

    prepare(archive, tmp_path / "p", train_size=32, test_size=32, on_error="skip", max_skipped=0.07)
    skipped = pl.read_csv(tmp_path / "p/skipped.csv")
    rows = pl.read_parquet(tmp_path / "p/metadata.parquet")
    assert (rows.height, skipped.height) == (42, 3)
    assert skipped["source"].to_list() == ["train/jay/cut.jpg", "train/owl/gone.jpg", "train/wren/page.jpg"]
    assert skipped["reason"][1].startswith("an empty file")
    output = capsys.readouterr().out
    assert "3 photographs cannot be used and were left out" in output and "skipped.csv has the reasons" in output
    assert "1 classes have lost all their photographs" in output

    for path, content in {"jay/cut.jpg": whole, "owl/gone.jpg": whole, "wren/page.jpg": whole}.items():
        content.save(archive / "train" / path)
    prepare(archive, tmp_path / "p", train_size=32, test_size=32)
    assert "3 written, 42 already there" in capsys.readouterr().out
    assert pl.read_parquet(tmp_path / "p/metadata.parquet").height == 45 and not (tmp_path / "p/skipped.csv").exists()


def test_metadata_knows_size_checksum_and_place_of_each_bird(tmp_path):
    wide, tall = painted(200, 100, (50, 30, 80, 40, RED)), painted(40, 80)
    archive = archive_of(tmp_path / "a", ("a.jpg", wide, (50, 30, 80, 40), 1), ("b.jpg", tall, (0, 0, 40, 80), 0))
    prepare(archive, tmp_path / "p", train_size=112, test_size=64)
    train, test = pl.read_parquet(tmp_path / "p/metadata.parquet").rows(named=True)
    for row, size, bird in ((train, (200, 100), (16, 36, 80, 40)), (test, (40, 80), (16, 0, 32, 64))):
        assert (row["width"], row["height"]) == size
        assert tuple(row[f"bird_{name}"] for name in ("x", "y", "width", "height")) == bird
        assert row["crc32"] == zlib.crc32((tmp_path / "p/cleaned_images" / row["path"]).read_bytes())
    before = pl.read_parquet(tmp_path / "p/metadata.parquet")
    prepare(archive, tmp_path / "p", train_size=112, test_size=64)  # nothing is made, and as much is known
    assert pl.read_parquet(tmp_path / "p/metadata.parquet").equals(before)


def test_without_a_crop_the_whole_photograph_is_shown(tmp_path):
    photograph = painted(100, 50, (40, 20, 10, 10, RED))
    archive = archive_of(tmp_path / "a", *[(f"{n}.jpg", photograph, (40, 20, 10, 10), n) for n in (0, 1)])
    prepare(archive, tmp_path / "p", train_size=100, test_size=50, crop="none")
    for name, size in (("1", 100), ("0", 50)):
        image = pixels_of(tmp_path / f"p/cleaned_images/0295/{name}.jpg")
        assert_colour(image, size // 2, size // 4 + size // 100, GREY)
        assert_colour(image, round(0.45 * size), size // 2, RED)
        assert_colour(image, size // 2, size // 8, BLACK)
    assert json.loads((tmp_path / "p/prepared.json").read_text())["crop"] == "none"
    with pytest.raises(UserError, match="made with crop=none, not box"):
        prepare(archive, tmp_path / "p", train_size=100, test_size=50)


def test_several_birds_of_a_photograph_become_several_images(tmp_path):
    photograph = painted(100, 50, (0, 0, 50, 50, RED), (50, 0, 50, 50, BLUE))
    for split in ("train", "test"):
        folders_of(tmp_path / "a", **{split: {f"{split}.png": photograph}})
    lines = ["path,label,split,bb_x,bb_y,bb_width,bb_height"]
    lines += [
        f"{s}/{s}.png,{name},{s},{x},0,50,50" for s in ("train", "test") for x, name in ((0, "jay"), (50, "wren"))
    ]
    (tmp_path / "a/birds.csv").write_text("\n".join(lines))
    prepare(tmp_path / "a", tmp_path / "p", train_size=32, test_size=32)
    rows = pl.read_parquet(tmp_path / "p/metadata.parquet").rows(named=True)
    assert [(row["path"], row["source"], row["species_name"]) for row in rows[:2]] == [
        ("train/train.png", "train/train.png", "jay"),
        ("train/train_2.png", "train/train.png", "wren"),
    ]
    for row in rows[2:]:
        colour = RED if row["species_name"] == "jay" else BLUE
        assert_colour(pixels_of(tmp_path / "p/cleaned_images" / row["path"]), 16, 16, colour)


def test_a_large_jpeg_is_decoded_at_a_reduced_scale(tmp_path, monkeypatch):
    """And shows the same."""
    whole = painted(1600, 1200, (400, 300, 800, 600, RED), (700, 500, 200, 200, BLUE))
    archive = archive_of(tmp_path / "a", *[(f"{n}.jpg", whole, (400, 300, 800, 600), n) for n in (0, 1)])
    scales, read = [], Picture.read
    monkeypatch.setattr(Picture, "read", lambda self, scale=1.0: scales.append(scale) or read(self, scale))
    prepare(archive, tmp_path / "p", train_size=64, test_size=64, margin=0)
    assert scales == [2 * 64 / 800] * 2
    for name in "01":
        image = pixels_of(tmp_path / f"p/cleaned_images/0295/{name}.jpg")
        for x, y, colour in ((32, 4, BLACK), (4, 32, RED), (31, 29, BLUE), (60, 32, RED)):
            assert_colour(image, x, y, colour)


def test_a_damaged_image_is_made_again(tmp_path, capsys):
    photographs = [(f"{n}.jpg", painted(100, 80, (5, 5, 50, 50, RED)), (5, 5, 50, 50), n) for n in (0, 1)]
    archive, out = archive_of(tmp_path / "a", *photographs), tmp_path / "p"
    prepare(archive, out)
    before, image = contents(out), out / "cleaned_images/0295/1.jpg"
    for damaged in (image.read_bytes()[:-200], jpeg(painted(269, 269), tmp_path)):
        image.write_bytes(damaged)
        prepare(archive, out)
        assert "1 written, 1 already there" in capsys.readouterr().out
        assert contents(out) == before


def test_files_of_others_are_left_alone(tmp_path):
    photographs = [(f"{n}.jpg", painted(100, 80), (5, 5, 50, 50), n) for n in (0, 1)]
    archive, out = archive_of(tmp_path / "a", *photographs), tmp_path / "p"
    out.mkdir()
    (out / "classes.txt").write_text("0 person\n")
    before = contents(tmp_path)
    for folder, message in ((out, "holds a classes.txt that `prepare` has not written"), (archive, "is the archive")):
        for options in ({}, {"metadata_only": True}):
            with pytest.raises(UserError, match=message):
                prepare(archive, folder, **options)
    assert contents(tmp_path) == before


def test_one_photograph_with_several_birds_is_one_failure(tmp_path):
    whole = painted(60, 40)
    archive = folders_of(tmp_path / "a", train={f"{n}.png": whole for n in "abc"}, test={"d.png": whole})
    (archive / "train/a.png").write_bytes(b"<html></html>")
    lines = ["path,label,split,bb_x,bb_y,bb_width,bb_height"]
    lines += [f"train/{name}.png,jay,train,{x},0,20,20" for name in "abc" for x in (0, 20, 40)]
    lines += ["test/d.png,wren,test,0,0,20,20", "test/d.png,jay,test,20,0,20,20"]
    (archive / "birds.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"1 photographs cannot be used, more than max_skipped=0.2 of 4"):
        prepare(archive, tmp_path / "p", on_error="skip", max_skipped=0.2)
    prepare(archive, tmp_path / "p", on_error="skip", max_skipped=0.25)
    assert pl.read_csv(tmp_path / "p/skipped.csv").height == 1
    assert pl.read_parquet(tmp_path / "p/metadata.parquet").height == 8


def test_a_split_without_a_usable_photograph_is_refused(tmp_path):
    whole = painted(60, 40)
    train = {f"{name}/{n}.png": whole for name in ("jay", "wren") for n in range(3)}
    archive = folders_of(tmp_path / "a", train=train, test={"jay/x.png": b"", "wren/y.png": b""})
    with pytest.raises(UserError, match="no photograph of one of the splits can be used"):
        prepare(archive, tmp_path / "p", on_error="skip", max_skipped=1)
    assert not (tmp_path / "p/metadata.parquet").exists()


def test_a_rerun_that_skips_again_keeps_table_and_pack(tmp_path, capsys):
    whole = painted(60, 40)
    train = {f"{name}/{n}.png": whole for name in ("jay", "wren") for n in range(3)} | {"jay/bad.png": b""}
    archive = folders_of(tmp_path / "a", train=train, test={"jay/x.png": whole, "wren/y.png": whole})
    options = dict(on_error="skip", max_skipped=0.2, pack=True, train_size=32, test_size=32)
    for outcome in ("written in", "already there"):
        prepare(archive, tmp_path / "p", **options)
        assert outcome in capsys.readouterr().out.splitlines()[-1]
    whole.save(archive / "train/jay/bad.png")
    prepare(archive, tmp_path / "p", **options)
    assert "written in" in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "p/skipped.csv").exists()


def test_one_process_at_a_time_prepares_a_folder(tmp_path):
    photographs = [(f"{n}.jpg", painted(100, 80), (5, 5, 50, 50), n) for n in (0, 1)]
    archive, out = archive_of(tmp_path / "a", *photographs), tmp_path / "p"
    out.mkdir()
    with lock(out / "lock", "not this one"), pytest.raises(UserError, match="another process prepares .*/p right now"):
        prepare(archive, out)
    prepare(archive, out)


@pytest.mark.parametrize("changed", [{"on_error": "stop"}, {"max_skipped": 2}, {"max_pixels": 0}, {"crop": "bird"}])
def test_a_wrong_flag_is_refused_first(painted_archive, tmp_path, changed):
    with pytest.raises(ConfigError, match=f"{next(iter(changed))} is .*: give"):
        prepare(painted_archive, tmp_path / "p", **changed)
    assert not (tmp_path / "p").exists()
