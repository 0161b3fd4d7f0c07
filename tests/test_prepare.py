"""Preparing an archive: geometry, odd files, broken files, interruption, reruns."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vit_nabirds.data.archive import read_archive
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.errors import UserError
from vit_nabirds.parallel.cpus import cpu_share

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


def test_odd_files_are_read_as_their_pixels_are_stored(tmp_path, capsys):
    photograph = painted(60, 40, (0, 0, 30, 40, RED), (30, 0, 30, 40, BLUE))
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to show": would make it 40 x 60
    transparent = photograph.convert("RGBA")
    transparent.putalpha(90)
    box = (0, 0, 60, 40)
    grey, cmyk = photograph.convert("L"), photograph.convert("CMYK")
    files = [
        ("plain.JPG", photograph, box, 1),
        ("exif.jpg", jpeg(photograph, tmp_path, exif=turned, quality=98, subsampling=0), box, 0),
        ("png.jpg", transparent, box, 0),
        ("palette.jpg", photograph.quantize(8), box, 0),
        ("cmyk.jpg", cmyk, box, 0),
        ("grey.jpg", grey, box, 0),
    ]
    archive = archive_of(tmp_path / "a", *files)
    sizes = (archive / "sizes.txt").read_text().replace("u-1 100 80", "u-1 60 40")
    (archive / "sizes.txt").write_text(sizes)
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
    output = capsys.readouterr().out
    assert "2 files are not JPEG" in output and "1 files have an alpha channel" in output


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
    assert pl.read_parquet(out / "metadata.parquet").equals(read_archive(archive)[0])


def test_a_missing_photograph_is_found_before_any_work(tmp_path):
    good = painted(100, 80)
    rows = [(f"{n:02}.jpg", good if n < 2 else None, (0, 0, 9, 9), n % 2) for n in range(14)]
    archive = archive_of(tmp_path / "a", *rows)
    with pytest.raises(UserError, match=r"12 photographs cannot be used(.|\n)*02.jpg: no such file(.|\n)*\.\.\."):
        prepare(archive, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_photograph_of_an_unexpected_size_is_used_and_counted(tmp_path, capsys):
    larger = jpeg(painted(300, 300, (90, 70, 10, 10, GREEN)), tmp_path, quality=98, subsampling=0)
    good = painted(100, 80)
    archive = archive_of(tmp_path / "a", ("a.jpg", larger, (90, 70, 10, 10), 0), ("b.jpg", good, (0, 0, 9, 9), 1))
    prepare(archive, tmp_path / "p")
    assert_colour(pixels_of(tmp_path / "p/cleaned_images/0295/a.jpg"), 112, 112, GREEN)
    assert "1 photographs are not of the size in sizes.txt" in capsys.readouterr().out


@pytest.fixture(scope="module")
def painted_archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("painted") / "archive"
    draw_archive(folder, species=3, train=60, test=40)
    return folder


HELD = """
import os, signal, sys
from vit_nabirds.data.prepare import prepare

def interrupt(*_):
    os.write(2, b"interrupted\\n")
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)  # a parent may have told it to ignore Ctrl-C
prepare(*sys.argv[1:])
"""


@pytest.fixture
def held_run(painted_archive, tmp_path):
    """A run on an archive whose photographs are pipes from the 21st on, and waits for what is written to them."""
    archive, out = shutil.copytree(painted_archive, tmp_path / "archive"), tmp_path / "out"
    pipes = [archive / "images" / path for path in read_archive(archive)[0]["path"][20:]]
    for pipe in pipes:
        pipe.unlink()
        os.mkfifo(pipe)
    command = [sys.executable, "-c", HELD, archive, out]
    options = dict(cwd=Path(__file__).parents[1], env=os.environ | {"SLURM_CPUS_PER_TASK": "1"}, text=True)
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as process:
        while len(list(out.glob("cleaned_images/*/*.jpg"))) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        yield process, pipes, out
        process.kill()


def test_a_rerun_after_kill_9_gives_what_an_undisturbed_run_gives(held_run, painted_archive, tmp_path):
    process, _, out = held_run
    process.kill()
    process.wait()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("cleaned_images/*/*.jpg")}
    assert len(finished) == 20
    assert not (out / "metadata.parquet").exists()
    # what a kill between writing and renaming leaves
    stale = next(iter(finished)).with_name("0123.jpg.tmp")
    stale.write_bytes(b"\xff\xd8")

    prepare(painted_archive, out)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    prepare(painted_archive, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_ctrl_c_finishes_only_the_photograph_in_hand(held_run, painted_archive):
    process, pipes, out = held_run
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "interrupted\n"
    written = 0
    while process.poll() is None and written < len(pipes):
        time.sleep(0.2)
        with contextlib.suppress(OSError):  # nobody reads from the pipe now
            pipe = os.open(pipes[written], os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, next((painted_archive / "images").rglob(pipes[written].name)).read_bytes())
            os.close(pipe)
            written += 1
    stderr = process.stderr.read()
    assert stderr.count("Traceback") == 1 and stderr.strip().endswith("KeyboardInterrupt")
    assert 1 <= written < len(pipes)
    assert len(list(out.glob("cleaned_images/*/*.jpg"))) == 20 + written
    assert not list(out.glob("cleaned_images/*/*.tmp"))


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
    assert list(contents(out)) == ["metadata.parquet"]
    assert pl.read_parquet(out / "metadata.parquet").equals(read_archive(archive)[0])
    (tmp_path / "elsewhere").rename(archive / "images")
    prepare(archive, out)
    assert len(contents(out)) == 4

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


def test_cpu_share_comes_from_slurm_or_the_affinity_mask(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert cpu_share() == 7
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert 1 <= cpu_share() <= os.cpu_count()
