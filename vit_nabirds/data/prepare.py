"""Prepares an archive: cuts each bird out, fits it into a square and writes it as a small JPEG.

A run may be killed at any moment and started again: each file gets its name only when it is complete, and
metadata.parquet, written last, marks the folder as complete.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import simplejpeg

from vit_nabirds.data import taxonomy
from vit_nabirds.data.archives import Archive, read_archive
from vit_nabirds.data.archives.listing import BOX, STUCK_OUT
from vit_nabirds.data.boxes import lies_in, to_upright
from vit_nabirds.data.crops import Box, Crop, cut, place
from vit_nabirds.data.foreign import leads_out, read_bytes, read_parquet, read_text, without_formulas
from vit_nabirds.data.images import MAX_SIDE
from vit_nabirds.data.pack import discard as discard_pack
from vit_nabirds.data.pack import pack as pack_images
from vit_nabirds.data.pictures import MAX_PIXELS, open_picture
from vit_nabirds.data.table import BIRD, PARQUET_ERRORS, PREPARED, SKIPPED
from vit_nabirds.errors import ConfigError, UserError, quoted, remedy_of
from vit_nabirds.files import PARTIAL, write_json, written_whole
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.parallel.locks import lock
from vit_nabirds.terminal import progress

# The columns that an image's pixels depend on: after a change of any other one, finished images stay valid.
_GEOMETRY = ["path", "source", *BOX, "width", "height", "is_training_img"]
# What is known of an image once it is prepared: size and box of the upright photograph, checksum of the file.
_FOUND = {"width": pl.Int32, "height": pl.Int32, "crc32": pl.UInt32}
_FOUND |= dict.fromkeys(BOX, pl.Float64) | dict.fromkeys(BIRD, pl.Int32)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pixels of a folder's images depend on, beside the archive."""

    train_size: int = 269
    test_size: int = 224
    margin: float = 0.2
    crop: str = "box"

    def __post_init__(self) -> None:
        if not 16 <= min(self.train_size, self.test_size) <= max(self.train_size, self.test_size) <= MAX_SIDE:
            sizes = f"train_size is {self.train_size}, test_size {self.test_size}"
            raise ConfigError(f"{sizes}: give at least 16 pixels, and at most {MAX_SIDE:,}.")
        if self.train_size < self.test_size:
            raise ConfigError(
                f"train_size is {self.train_size}, test_size {self.test_size}: training crops at random from images "
                f"that are at least as large, so give train_size={round(1.2 * self.test_size)} or so."
            )
        if not 0 <= self.margin <= 1:
            raise ConfigError(f"margin is {self.margin}: give a share of the bounding box from 0 to 1, as 0.2.")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which photographs may be used, and what becomes of those that cannot."""

    on_error: str
    max_skipped: float  # share of all photographs
    max_pixels: int

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is {self.on_error!r}: give 'raise' or 'skip'.")
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError(f"max_skipped is {self.max_skipped}: give a share of the photographs from 0 to 1.")
        if self.max_pixels < 1:
            raise ConfigError(f"max_pixels is {self.max_pixels}: give a positive number.")


def prepare(
    archive: str | Path,
    out: str | Path,
    *,
    metadata_only: bool = False,
    pack: bool = False,
    test_share: float | None = None,
    on_error: str = "raise",
    max_skipped: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    **settings,
) -> None:
    """Write out/metadata.parquet and out/cleaned_images/<path>; UserError for any mistake.

    Training images have train_size² pixels and show the bounding box and `margin` of its width and height on each
    side; test images have test_size² pixels and show the box alone. With `crop` "none" both show the whole photograph.
    `settings` are those of `Settings`. `pack` adds out/packed/ for faster training.
    """
    out, started = Path(out), time.perf_counter()
    settings, policy = Settings(**settings), Policy(on_error, max_skipped, max_pixels)
    if pack and metadata_only:
        raise ConfigError("--pack packs the images that --metadata_only leaves out: give one of them.")
    read = read_archive(archive, settings.crop, test_share)
    stored = dataclasses.asdict(settings)
    stored["archive"] = hashlib.sha256(read.table.select(_GEOMETRY).write_csv().encode()).hexdigest()
    _check_out(out, Path(archive), read.folder, metadata_only)
    _check_settings(out, stored)
    print(f"{archive}: {read.kind}", flush=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out / "lock", f"another process prepares {out} right now: wait for its end."):
            table, notes, written = read.table, collections.Counter(read.notes), None
            if not metadata_only:
                table, written = _prepare_images(read, out, settings, policy, stored, notes)
            levels = _write_tables(out, table, read.taxonomy, skipped=read.table.height - table.height)
    except OSError as error:  # an unreadable photograph is a UserError by now
        advice = f"{remedy_of(error)} or choose another --out, and run the command again; finished images are kept."
        raise UserError(f"{out}: {error}. {advice}") from error

    _summarize(out, table, notes, levels, written, time.perf_counter() - started)
    if pack:
        pack_images(out)


def _check_out(out: Path, archive: Path, photographs: Path, metadata_only: bool) -> None:
    """Raise UserError if `out` holds what must not be touched."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file. Choose another --out.")
    if (out / "checkpoints").is_dir():
        raise UserError(f"{out}: is the workdir of a run. Choose another --out.")
    if out.resolve().is_relative_to(photographs.resolve()) or out.resolve() == archive.resolve():
        raise UserError(
            f"{out}: is the archive, or in its folder of photographs, {quoted(photographs)}. Choose another --out."
        )
    is_ours = (out / PREPARED).exists() or (out / "metadata.parquet").exists()
    if foreign := [name for name in (*taxonomy.FILES, SKIPPED) if (out / name).exists() and not is_ours]:
        raise UserError(f"{out}: holds a {foreign[0]} that `prepare` has not written. Choose another --out.")
    if metadata_only and (out / "cleaned_images").exists():
        raise UserError(
            f"{out}: holds images, which must fit its metadata. Run again without --metadata_only (finished images "
            "are kept), or choose another --out."
        )


def _check_settings(out: Path, settings: dict) -> None:
    """Raise UserError if `out` holds images made with other settings, which must not be mixed with new ones."""
    file = out / PREPARED
    if not file.exists() and not (out / "cleaned_images").exists():
        return
    try:
        earlier = {"crop": "box"} | json.loads(read_text(file, 2**20))  # the first version knew nothing else
        differing = [name for name in settings if earlier[name] != settings[name]]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: missing, or not written by `prepare`. Choose another --out.") from error
    changes = ", ".join(f"{name}={earlier[name]}, not {settings[name]}" for name in differing if name != "archive")
    if changes:
        raise UserError(f"{out}: its images were made with {quoted(changes)}. Choose another --out.")
    if differing:
        raise UserError(
            f"{out}: holds images of another archive, or paths, boxes or splits of this one have changed "
            "since. Choose another --out, or delete this folder first."
        )


def _write_tables(out: Path, table: pl.DataFrame, tree: pl.DataFrame | None, skipped: int) -> str:
    """Write the taxonomy and then metadata.parquet. Returns how many classes are how deep in the tree."""
    for name, text in taxonomy.as_files(tree).items():
        if text is None:
            (out / name).unlink(missing_ok=True)
        else:
            _write(out / name, text.encode())
    buffer = io.BytesIO()
    table.write_parquet(buffer, metadata={"skipped": str(skipped)})
    _write(out / "metadata.parquet", buffer.getvalue())
    return taxonomy.levels_in_words(tree, table)


def _summarize(
    out: Path, table: pl.DataFrame, notes: dict[str, int], levels: str, written: int | None, seconds: float
) -> None:
    trained, species = table["is_training_img"].sum(), table["species_name"].n_unique()
    categories = table["subcategory"].n_unique()
    print(
        f"{out}: {table.height:,} photographs ({trained:,} train, {table.height - trained:,} test), {species:,} species"
        + (f" in {categories:,} categories" if categories != species else "")
        + f", {table['photographer'].n_unique() - table['photographer'].has_nulls():,} photographers"
    )
    if levels:
        print(f"taxonomy: {levels}")
    if written is not None:
        print(f"images: {written:,} written, {table.height - written:,} already there")
    for note, count in sorted(notes.items()):
        if count:
            print(f"note: {count:,} {note}")
    print(f"done in {seconds:.1f} s" + (f", {written / seconds:,.0f} images/s" if written else ""))


def _prepare_images(
    read: Archive, out: Path, settings: Settings, policy: Policy, stored: dict, notes: collections.Counter
) -> tuple[pl.DataFrame, int]:
    """Make the images that no earlier run has finished. Returns the table of what can be used, with what was found, and
    the number of images made; counts oddities in `notes`."""
    sources = list_files(read.folder, {os.path.dirname(source) for source in read.table["source"].unique()})
    table = read.table.with_columns(missing=~pl.col("source").is_in(list(sources)))
    cleaned, known = out / "cleaned_images", _known_checksums(out)
    present = _start(out, table, stored)
    job = _Job(read.folder, cleaned, settings, policy.max_pixels, present, known)
    found = list(progress(job.run(table), table.height, "images", "cropping"))
    if job.written:
        discard_pack(out)
    notes.update(job.oddities)

    failures = pl.DataFrame({"source": table["source"], "reason": [x if isinstance(x, str) else None for x in found]})
    failures = failures.drop_nulls().unique(maintain_order=True)
    _refuse_or_skip(out, table["source"].n_unique(), failures, read.folder, policy)
    used = table.drop("missing").filter(pl.Series([not isinstance(x, str) for x in found], dtype=pl.Boolean))
    if used["is_training_img"].n_unique() < 2:
        raise UserError(f"{out}: no photograph of one of the splits can be used; {out / SKIPPED} has the reasons.")
    notes[f"photographs cannot be used and were left out: {out / SKIPPED} has the reasons"] = failures.height
    lost = table["subcategory"].n_unique() - used["subcategory"].n_unique()
    notes["classes have lost all their photographs"] = lost
    rows = pl.DataFrame([x for x in found if not isinstance(x, str)], schema=_FOUND, orient="row")
    return used.drop(name for name in _FOUND if name in used.columns).hstack(rows), len(job.written)


def _start(out: Path, table: pl.DataFrame, stored: dict) -> set[str]:
    """Make the folders, and clear away what the images to be made will outdate. Returns the files that are there."""
    cleaned, paths = out / "cleaned_images", set(table["path"])
    folders = {os.path.dirname(path) for path in paths}
    if led := [folder for folder in folders if leads_out(cleaned, os.path.join(folder, "-"))]:
        raise UserError(
            f"{quoted(cleaned / led[0], 1000)}: a link out of {cleaned}. Remove it, or choose another --out."
        )
    present = list_files(cleaned, folders)
    wanted = set(table.filter(~without_formulas(pl.col("source")).is_in(_skipped_before(out)))["path"])
    if not wanted <= present:
        discard_pack(out)
        (out / "metadata.parquet").unlink(missing_ok=True)
    write_json(out / PREPARED, stored)
    for folder in folders:
        (cleaned / folder).mkdir(parents=True, exist_ok=True)
    for path in present - paths:
        if path.endswith(PARTIAL):  # a killed run left it
            (cleaned / path).unlink()
    return present


def _known_checksums(out: Path) -> dict[str, int]:
    """The checksum of each image that an earlier run has finished, by path."""
    try:
        return dict(read_parquet(out / "metadata.parquet", columns=["path", "crc32"]).rows())
    except PARQUET_ERRORS:
        return {}  # there is none, or it is damaged, or of an earlier version


def _skipped_before(out: Path) -> list[str]:
    """The photographs that an earlier run has left out."""
    try:
        return pl.read_csv(read_bytes(out / SKIPPED), infer_schema=False)["source"].to_list()
    except PARQUET_ERRORS:
        return []


def list_files(root: Path, folders: set[str]) -> set[str]:
    """The names in `folders` under `root`, relative to it. Listed, because a cluster's disks are slow to stat each."""
    present = [folder for folder in folders if (root / folder).is_dir()]
    return {os.path.join(folder, name) for folder in present for name in os.listdir(root / folder)}


def _refuse_or_skip(out: Path, count: int, failures: pl.DataFrame, folder: Path, policy: Policy) -> None:
    """Write those of `count` photographs that cannot be used to skipped.csv, or raise UserError."""
    is_limited = policy.on_error == "skip"
    if failures.height > policy.max_skipped * count or failures.height and not is_limited:
        limit = f", more than max_skipped={policy.max_skipped:g} of {count:,}" if is_limited else ""
        shown = "\n  ".join(
            f"{quoted(folder / source, 1000)}: {quoted(reason)}" for source, reason in failures.sort("source").rows()
        )
        raise UserError(
            f"{failures.height:,} photographs cannot be used{limit}:\n  {shown}\n"
            "Put good copies there and run the same command again (finished images are kept), or leave them out with "
            f"{'a larger --max_skipped' if is_limited else '--on_error=skip'}."
        )
    if failures.height:
        _write(out / SKIPPED, failures.select(without_formulas(pl.all())).write_csv().encode())
    else:
        (out / SKIPPED).unlink(missing_ok=True)


class _Job:
    """Makes the images of a table in threads, and counts what is odd about their photographs."""

    def __init__(
        self,
        source: Path,
        cleaned: Path,
        settings: Settings,
        max_pixels: int,
        present: set[str],
        known: dict[str, int],
    ) -> None:
        self._source, self._cleaned, self._settings = source, cleaned, settings
        self._max_pixels, self._present, self._known = max_pixels, present, known
        self._oddities = []  # of all threads: appending is atomic
        self.written = []  # paths

    @property
    def oddities(self) -> collections.Counter:
        return collections.Counter(self._oddities)

    def run(self, table: pl.DataFrame) -> Iterator[tuple | str]:
        """For each row what was found, the values of `_FOUND`; or why its photograph cannot be used."""
        # Threads, because decoding, resizing and encoding release the GIL: two threads, like two processes, prepare 300
        # photographs of 1024x768 a second, and one 170. OpenCV's own threads would compete with them.
        cv2.setNumThreads(1)
        pool = ThreadPoolExecutor(cpu_share())
        try:
            for rows in table.iter_slices(1024):
                yield from pool.map(self._one, rows.iter_rows(named=True))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C or on a full disk, finish only the images in hand

    def _one(self, row: dict) -> tuple | str:
        if row["missing"]:
            return "no such file"
        if leads_out(self._source, row["source"]):
            return f"a link out of {self._source}"
        if not os.path.isfile(self._source / row["source"]):  # a pipe would be waited for
            return "not a regular file"
        target, data = self._cleaned / row["path"], self._finished(row["path"])
        try:
            size, box, crop, image = self._cut(row, data is None)
        except Exception as error:  # noqa: BLE001, a damaged file makes a decoder raise anything
            return str(error) or type(error).__name__
        if data is None:
            # 4:4:4, because in so small an image an eye ring is a pixel wide; it costs 23 % more bytes than 4:2:0.
            data = simplejpeg.encode_jpeg(image, quality=95, colorspace="RGB", colorsubsampling="444")
            _write(target, data)
            self.written.append(row["path"])
        left, top, right, bottom = crop.bird
        return (*size, zlib.crc32(data), *(box or (None,) * 4), left, top, right - left, bottom - top)

    def _finished(self, path: str) -> bytes | None:
        """The image if it is there already, and is what was written."""
        data = read_bytes(self._cleaned / path) if path in self._present else None
        return None if data is None or zlib.crc32(data) != self._known.get(path, zlib.crc32(data)) else data

    def _cut(self, row: dict, is_new: bool) -> tuple[tuple[int, int], Box | None, Crop, np.ndarray | None]:
        """Size and box of the upright photograph, and what becomes of it; of a finished one without the image."""
        picture, box, oddities = open_picture(self._source / row["source"], self._max_pixels), None, []
        if row["bb_x"] is not None:
            stated = (row["width"], row["height"]) if row["width"] else None
            box, is_open = to_upright(tuple(row[name] for name in BOX), stated, picture)
            if is_open:
                oddities.append(
                    "photographs are turned by EXIF, and nothing says if their boxes are too: taken as turned"
                )
            if stated not in (None, picture.size, picture.stored_size):
                oddities.append("photographs are not of the stated size; boxes were clamped to the real one")
            elif not lies_in(box, picture.size):
                oddities.append(STUCK_OUT)
        is_train, settings = row["is_training_img"], self._settings
        size = settings.train_size if is_train else settings.test_size
        crop = place(picture.size, box, size, settings.margin if is_train and box else 0)
        if not is_new:
            return picture.size, box, crop, None
        image = cut(picture, crop)
        if crop.scale > 1:
            oddities.append("images show less than they have pixels for, and were enlarged")
        self._oddities += [*oddities, *picture.oddities]
        return picture.size, box, crop, image


def _write(file: Path, data: bytes) -> None:
    with written_whole(file, f"{threading.get_ident()}{PARTIAL}") as partial:  # shorter than many a name
        partial.write_bytes(data)
