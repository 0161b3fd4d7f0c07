"""Archive folder -> prepared folder: each bird cut out, fitted into a square and written as a small JPEG.

A run may be killed at any moment and started again. Images appear under their names only when complete, and
metadata.parquet is written last: where it lies, the folder is complete.
"""

import collections
import hashlib
import io
import json
import os
import posixpath
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import polars as pl
import simplejpeg
from tqdm import tqdm

from vit_nabirds.data.archive import read_archive_with_notes
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.errors import UserError, remedy_of
from vit_nabirds.data.images import PREPARED, open_picture
from vit_nabirds.data.pack import discard as discard_pack
from vit_nabirds.data.pack import pack as pack_images

# What decides an image's pixels: a corrected name or label leaves finished images valid.
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
    workers: int | None = None,
) -> None:
    """Writes out/metadata.parquet and out/cleaned_images/<path in images.txt>; UserError for any mistake.

    Train: the bounding box and `margin` of its width and height on each side, in train_size² pixels. Test:
    the bounding box in test_size² pixels. `workers` threads, by default as many as CPU cores are ours. `pack` writes
    out/packed/ too, which training reads instead of the images where it is there.
    """
    archive, out = Path(archive), Path(out)
    source = archive / "images"
    if min(train_size, test_size) < 16:
        raise UserError(f"train_size is {train_size}, test_size {test_size}: give at least 16 pixels.")
    if not 0 <= margin <= 1:
        raise UserError(f"margin is {margin}: give a part of the bounding box from 0 to 1, as 0.2.")
    if pack and metadata_only:
        raise UserError("--pack packs the images that --metadata_only leaves out: give one of them.")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: give at least 1, or leave it out for every core of the job.")
    if out.resolve().is_relative_to(source.resolve()) or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is a file, or in the archive's own images folder. Choose another --out.")

    started = time.perf_counter()
    table, notes = read_archive_with_notes(archive)
    settings = {"train_size": train_size, "test_size": test_size, "margin": float(margin)}
    settings["archive"] = hashlib.sha256(table.select(_GEOMETRY).write_csv().encode()).hexdigest()
    written = 0
    try:
        if not metadata_only:
            written = _prepare_images(table, source, out, settings, workers or cpu_share(), notes)
        elif (out / "cleaned_images").exists():
            raise UserError(
                f"{out}: holds images, which have to fit its metadata. Run again without --metadata_only "
                "(finished images are kept), or choose another --out."
            )
        out.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        _write(out / "metadata.parquet", buffer.getvalue())
    except OSError as error:  # a photograph that cannot be read is a UserError by now
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


def _prepare_images(
    table: pl.DataFrame, source: Path, out: Path, settings: dict, workers: int, notes: dict[str, int]
) -> int:
    """How many images it wrote, those no earlier run had finished; counts what is unusual into `notes`."""
    cleaned, paths = out / "cleaned_images", table["path"].to_list()
    _check_settings(out, settings)
    photographs = _files(source, paths)
    _refuse_photographs([f"{source / path}: no such file" for path in paths if path not in photographs])

    present = _files(cleaned, paths)
    todo = [row for row in table.iter_rows(named=True) if row["path"] not in present]
    out.mkdir(parents=True, exist_ok=True)
    if todo:
        discard_pack(out)
        (out / "metadata.parquet").unlink(missing_ok=True)
    _write(out / PREPARED, (json.dumps(settings, indent=2) + "\n").encode())
    for folder in {posixpath.dirname(path) for path in paths}:
        (cleaned / folder).mkdir(parents=True, exist_ok=True)
    for path in present:
        if path.endswith(_TEMPORARY):  # of a run that was killed
            (cleaned / path).unlink()

    # Threads, not processes: decoding, resizing and encoding release the GIL, and both did 300 photographs of
    # 1024x768 a second on two cores (170 on one). OpenCV's own threads would compete with them.
    cv2.setNumThreads(1)
    failures, counts = [], collections.Counter()
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = [pool.submit(_prepare_one, source, cleaned, row, settings) for row in todo]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit=" images", disable=None):
            failure, unusual = job.result()
            failures += failure
            counts.update(unusual)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or on a full disk, only the images in hand
    _refuse_photographs(sorted(failures))
    notes.update(counts)
    return len(todo)


def _check_settings(out: Path, settings: dict) -> None:
    """UserError if `out` holds images that were made with other settings: they would be mixed."""
    file = out / PREPARED
    if not file.exists():
        if (out / "cleaned_images").exists():
            raise UserError(f"{out}: holds images, but no {file.name} says how made. Choose another --out.")
        return
    try:
        earlier = json.loads(file.read_text())
        differing = [name for name in settings if earlier[name] != settings[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not written by `prepare`. Choose another --out.") from error
    if "archive" in differing:
        raise UserError(
            f"{out}: holds images of another archive, or paths, boxes or splits of this one have changed "
            "since. Choose another --out, or delete this folder first."
        )
    if differing:
        asked = ", ".join(f"{name}={earlier[name]}, not {settings[name]}" for name in differing)
        raise UserError(f"{out}: its images were made with {asked}. Choose another --out.")


def _files(root: Path, paths: list[str]) -> set[str]:
    """What lies in the folders of `paths` under `root`: a listing each, for a cluster's disks stat slowly."""
    found = set()
    for folder in {posixpath.dirname(path) for path in paths}:
        if (root / folder).is_dir():
            found.update(posixpath.join(folder, name) for name in os.listdir(root / folder))
    return found


def _refuse_photographs(failures: list[str]) -> None:
    if failures:
        shown = "\n  ".join(failures[:10] + ["..."] * (len(failures) > 10))
        raise UserError(
            f"{len(failures):,} photographs cannot be used:\n  {shown}\n"
            "Put good copies there and run the same command again (finished images are kept), or delete "
            "their rows from images.txt and choose another --out."
        )


def _prepare_one(source: Path, cleaned: Path, row: dict, settings: dict) -> tuple[list[str], list[str]]:
    """Writes one image; (what makes the photograph unusable, what is unusual about it)."""
    unusual, file = [], source / row["path"]
    try:
        pixels = _read(file, unusual)
    except Exception as error:  # noqa: BLE001, for a damaged file makes a decoder raise anything
        return [f"{file}: {error}"], []
    height, width = pixels.shape[:2]
    if (width, height) != (row["width"], row["height"]):
        unusual.append("photographs are not of the size in sizes.txt; boxes were clamped to the real one")
    right, bottom = min(row["bb_x"] + row["bb_width"], width), min(row["bb_y"] + row["bb_height"], height)
    if right <= row["bb_x"] or bottom <= row["bb_y"]:
        return [f"{file}: its bounding box lies outside its real {width}x{height} pixels"], []

    train = row["is_training_img"]
    margin = settings["margin"] if train else 0
    margin_x, margin_y = margin * (right - row["bb_x"]), margin * (bottom - row["bb_y"])
    left, top = max(round(row["bb_x"] - margin_x), 0), max(round(row["bb_y"] - margin_y), 0)
    crop = pixels[top : round(bottom + margin_y), left : round(right + margin_x)]
    size = settings["train_size" if train else "test_size"]
    if max(crop.shape[:2]) < size:
        unusual.append("birds are smaller than the canvas and were enlarged")
    # 4:4:4, for in so small an image an eye ring is a pixel wide; it costs 23 % more bytes than 4:2:0.
    data = simplejpeg.encode_jpeg(fit(crop, size), quality=95, colorspace="RGB", colorsubsampling="444")
    _write(cleaned / row["path"], data)
    return [], unusual


def _read(file: Path, unusual: list[str]) -> np.ndarray:
    """uint8 RGB (height, width, 3) as stored: the boxes know nothing of an EXIF orientation."""
    data = file.read_bytes()
    if data.startswith(b"\xff\xd8"):
        # 370 photographs of 1024x768 a second on a core, where imageio reads 100 and OpenCV 140. Strict, for
        # OpenCV and Pillow fill the missing part of some truncated files with grey and say nothing.
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError as error:
            if "remature end" in str(error):  # anything else is for imageio to judge
                raise
    else:
        unusual.append("files are not JPEG, whatever their name says")
    open_picture(io.BytesIO(data)).close()
    with iio.imopen(data, "r", plugin="pillow") as photograph:
        mode = photograph.metadata(index=0)["mode"]
        if mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a pixel, convert it to 8")
        if mode.endswith("A"):
            unusual.append("files have an alpha channel, which was dropped")
        return photograph.read(index=0, mode="RGB")


def fit(crop: np.ndarray, size: int) -> np.ndarray:
    """The crop in the centre of a black (size, size, 3) canvas, its aspect ratio kept."""
    scale = size / max(crop.shape[:2])
    height, width = (max(round(side * scale), 1) for side in crop.shape[:2])
    top, left = (size - height) // 2, (size - width) // 2
    # Area averages every source pixel, where bicubic skips some and aliases; enlarging, area is blocky.
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[top : top + height, left : left + width] = cv2.resize(crop, (width, height), interpolation=how)
    return canvas


def _write(file: Path, data: bytes) -> None:
    """Under its name only when complete, so that a killed run leaves no half-written file."""
    temporary = file.with_name(file.name + _TEMPORARY)
    temporary.write_bytes(data)
    os.replace(temporary, file)
