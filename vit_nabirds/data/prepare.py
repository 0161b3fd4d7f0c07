"""Prepares an archive: cuts each bird out, fits it into a square and writes it as a small JPEG.

A run may be killed at any moment and started again: each file gets its name only when it is complete, and
metadata.parquet, written last, marks the folder as complete.
"""

import collections
import hashlib
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import simplejpeg
from tqdm import tqdm

from vit_nabirds.data.archive import read_archive
from vit_nabirds.data.images import JPEG, open_picture, to_rgb
from vit_nabirds.data.pack import discard as discard_pack
from vit_nabirds.data.pack import pack as pack_images
from vit_nabirds.data.table import PREPARED
from vit_nabirds.errors import ConfigError, UserError, remedy_of
from vit_nabirds.parallel.cpus import cpu_share

# The columns that an image's pixels depend on: after a change of any other one, finished images stay valid.
_GEOMETRY = ["UUID", "path", "bb_x", "bb_y", "bb_width", "bb_height", "is_training_img"]
_TEMPORARY = ".tmp"


def prepare(
    archive: str | Path,
    out: str | Path,
    *,
    metadata_only: bool = False,
    pack: bool = False,
    train_size: int = 269,
    test_size: int = 224,
    margin: float = 0.2,
) -> None:
    """Write out/metadata.parquet and out/cleaned_images/<path in images.txt>; UserError for any mistake.

    Training images have train_size² pixels and show the bounding box and `margin` of its width and height on each
    side; test images have test_size² pixels and show the box alone. `pack` adds out/packed/ for faster training.
    """
    archive, out, started = Path(archive), Path(out), time.perf_counter()
    if min(train_size, test_size) < 16:
        raise ConfigError(f"train_size is {train_size}, test_size {test_size}: give at least 16 pixels.")
    if not 0 <= margin <= 1:
        raise ConfigError(f"margin is {margin}: give a share of the bounding box from 0 to 1, as 0.2.")
    if pack and metadata_only:
        raise ConfigError("--pack packs the images that --metadata_only leaves out: give one of them.")
    if out.resolve().is_relative_to((archive / "images").resolve()) or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is a file, or in the archive's own images folder. Choose another --out.")

    table, notes = read_archive(archive)
    settings = {"train_size": train_size, "test_size": test_size, "margin": float(margin)}
    settings["archive"] = hashlib.sha256(table.select(_GEOMETRY).write_csv().encode()).hexdigest()
    written = 0
    try:
        if not metadata_only:
            written = _prepare_images(table, archive / "images", out, settings, notes)
        elif (out / "cleaned_images").exists():
            raise UserError(
                f"{out}: holds images, which must fit its metadata. Run again without --metadata_only (finished images "
                "are kept), or choose another --out."
            )
        out.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        _write(out / "metadata.parquet", buffer.getvalue())
    except OSError as error:  # an unreadable photograph is a UserError by now
        advice = f"{remedy_of(error)} or choose another --out, and run the command again; finished images are kept."
        raise UserError(f"{out}: {error}. {advice}") from error

    seconds, trained = time.perf_counter() - started, table["is_training_img"].sum()
    print(
        f"{out}: {table.height:,} photographs ({trained:,} train, {table.height - trained:,} test), "
        f"{table['species_name'].n_unique():,} species, {table['photographer'].n_unique():,} photographers"
    )
    if not metadata_only:
        print(f"images: {written:,} written, {table.height - written:,} already there")
    for note, count in sorted(notes.items()):
        if count:
            print(f"note: {count:,} {note}")
    print(f"done in {seconds:.1f} s" + (f", {written / seconds:,.0f} images/s" if written else ""))
    if pack:
        pack_images(out)


def _prepare_images(table: pl.DataFrame, source: Path, out: Path, settings: dict, notes: dict[str, int]) -> int:
    """Make the images that no earlier run has finished, and return their number; count oddities in `notes`."""
    cleaned, paths = out / "cleaned_images", table["path"].to_list()
    folders = {os.path.dirname(path) for path in paths}
    _check_settings(out, settings)
    photographs, present = _list_files(source, folders), _list_files(cleaned, folders)
    _refuse_photographs([f"{source / path}: no such file" for path in paths if path not in photographs])

    todo = [row for row in table.iter_rows(named=True) if row["path"] not in present]
    out.mkdir(parents=True, exist_ok=True)
    if todo:
        discard_pack(out)
        (out / "metadata.parquet").unlink(missing_ok=True)
    _write(out / PREPARED, (json.dumps(settings, indent=2) + "\n").encode())
    for folder in folders:
        (cleaned / folder).mkdir(parents=True, exist_ok=True)
    for path in present:
        if path.endswith(_TEMPORARY):  # a killed run left it
            (cleaned / path).unlink()

    # Threads, because decoding, resizing and encoding release the GIL: two threads, like two processes, prepare 300
    # photographs of 1024x768 a second, and one 170. OpenCV's own threads would compete with them.
    cv2.setNumThreads(1)
    oddities = []  # of all threads: appending is atomic
    pool = ThreadPoolExecutor(cpu_share())
    try:
        jobs = [pool.submit(_prepare_one, source, cleaned, row, settings, oddities) for row in todo]
        progress = tqdm(as_completed(jobs), total=len(jobs), unit=" images", disable=None)
        failures = [failure for job in progress if (failure := job.result())]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or on a full disk, finish only the images in hand
    _refuse_photographs(sorted(failures))
    notes.update(collections.Counter(oddities))
    return len(todo)


def _check_settings(out: Path, settings: dict) -> None:
    """Raise UserError if `out` holds images made with other settings, which must not be mixed with new ones."""
    file = out / PREPARED
    if not file.exists() and not (out / "cleaned_images").exists():
        return
    try:
        earlier = json.loads(file.read_text())
        differing = [name for name in settings if earlier[name] != settings[name]]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: missing, or not written by `prepare`. Choose another --out.") from error
    if "archive" in differing:
        raise UserError(
            f"{out}: holds images of another archive, or paths, boxes or splits of this one have changed "
            "since. Choose another --out, or delete this folder first."
        )
    if differing:
        changes = ", ".join(f"{name}={earlier[name]}, not {settings[name]}" for name in differing)
        raise UserError(f"{out}: its images were made with {changes}. Choose another --out.")


def _list_files(root: Path, folders: set[str]) -> set[str]:
    """The names in `folders` under `root`, relative to it. Listed, because a cluster's disks are slow to stat each."""
    present = [folder for folder in folders if (root / folder).is_dir()]
    return {os.path.join(folder, name) for folder in present for name in os.listdir(root / folder)}


def _refuse_photographs(failures: list[str]) -> None:
    if failures:
        shown = "\n  ".join(failures[:10] + ["..."] * (len(failures) > 10))
        raise UserError(
            f"{len(failures):,} photographs cannot be used:\n  {shown}\n"
            "Put good copies there and run the same command again (finished images are kept), or delete "
            "their rows from images.txt and choose another --out."
        )


def _prepare_one(source: Path, cleaned: Path, row: dict, settings: dict, oddities: list[str]) -> str | None:
    """Write one image, and append what is odd about its photograph. Returns why that cannot be used, if it cannot."""
    file, train = source / row["path"], row["is_training_img"]
    try:
        crop = _crop(_read(file, oddities), row, settings["margin"] if train else 0, oddities)
    except Exception as error:  # noqa: BLE001, a damaged file makes a decoder raise anything
        return f"{file}: {error}"
    size = settings["train_size" if train else "test_size"]
    if max(crop.shape[:2]) < size:
        oddities.append("birds are smaller than the canvas and were enlarged")
    # 4:4:4, because in so small an image an eye ring is a pixel wide; it costs 23 % more bytes than 4:2:0.
    data = simplejpeg.encode_jpeg(fit(crop, size), quality=95, colorspace="RGB", colorsubsampling="444")
    _write(cleaned / row["path"], data)
    return None


def _read(file: Path, oddities: list[str]) -> np.ndarray:
    """The pixels as stored, uint8 (height, width, 3): the boxes ignore an EXIF orientation."""
    data = file.read_bytes()
    if data.startswith(JPEG):
        # simplejpeg reads 370 photographs of 1024x768 a second on a core, Pillow 100 and OpenCV 140. Strict, because
        # the others silently fill the missing part of some truncated files with grey.
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError as error:
            if "remature end" in str(error):
                raise
            # Pillow may still read it: CMYK, for example.
    else:
        oddities.append("files are not JPEG, whatever their name says")
    with open_picture(io.BytesIO(data)) as photograph:
        if photograph.mode.endswith("A"):
            oddities.append("files have an alpha channel, which was dropped")
        return to_rgb(photograph)


def _crop(pixels: np.ndarray, row: dict, margin: float, oddities: list[str]) -> np.ndarray:
    """The bounding box, with `margin` of its width and height on each side where the photograph has it."""
    height, width = pixels.shape[:2]
    if (width, height) != (row["width"], row["height"]):
        oddities.append("photographs are not of the size in sizes.txt; boxes were clamped to the real one")
    left, top = row["bb_x"], row["bb_y"]
    right, bottom = min(left + row["bb_width"], width), min(top + row["bb_height"], height)
    if right <= left or bottom <= top:
        raise ValueError(f"its bounding box lies outside its real {width}x{height} pixels")
    across, down = margin * (right - left), margin * (bottom - top)
    left, top = max(round(left - across), 0), max(round(top - down), 0)
    return pixels[top : round(bottom + down), left : round(right + across)]


def fit(crop: np.ndarray, size: int) -> np.ndarray:
    """The crop in the centre of a black (size, size, 3) canvas, with its aspect ratio."""
    scale = size / max(crop.shape[:2])
    height, width = (max(round(side * scale), 1) for side in crop.shape[:2])
    top, left = (size - height) // 2, (size - width) // 2
    # Area averages all source pixels, where bicubic skips some and aliases; but it enlarges in blocks.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[top : top + height, left : left + width] = cv2.resize(crop, (width, height), interpolation=method)
    return canvas


def _write(file: Path, data: bytes) -> None:
    """Write a file that has its name only when complete, so that a killed run leaves no partial one."""
    temporary = file.with_name(file.name + _TEMPORARY)
    temporary.write_bytes(data)
    os.replace(temporary, file)
