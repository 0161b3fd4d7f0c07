"""A prepared folder -> this host's batches of uint8 images. Free of JAX, for worker processes import it."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import grain
import imageio.v3 as iio
import numpy as np
import polars as pl
import simplejpeg
from absl import flags

from vit_nabirds.archive import with_species_ids
from vit_nabirds.cpus import cpu_share
from vit_nabirds.errors import UserError

COLUMNS = ("path", "photographer", "is_training_img", "species_name")


def read_table(root: Path) -> pl.DataFrame:
    """metadata.parquet of a prepared folder, ours or the course's, with labels made anew: contiguous from 0."""
    file = root / "metadata.parquet"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: give a folder that `main.py prepare` has finished as --config.data.root (to "
            "`evaluate`, as --data_root)."
        )
    try:
        table = pl.read_parquet(file)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file} is not a readable Parquet file ({error}): prepare the folder again.") from None
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise UserError(
            f"{file} has no column {missing[0]!r} (its columns: {', '.join(table.columns)}): prepare again."
        )
    try:
        table = table.with_columns(
            *(pl.col(name).cast(pl.String).str.strip_chars() for name in ("path", "photographer", "species_name")),
            pl.col("is_training_img").cast(pl.Int8),
        )
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file} has a column of the wrong type ({error}): prepare the folder again.") from None
    for what, wrong in {
        "an empty path": pl.col("path").fill_null("") == "",
        "an empty species_name": pl.col("species_name").fill_null("") == "",
        "an empty photographer": pl.col("photographer").fill_null("") == "",
        "is_training_img other than 0 and 1": ~pl.col("is_training_img").is_in([0, 1]).fill_null(False),
        "a path that another row has too": pl.col("path").is_duplicated(),
    }.items():
        bad = table.with_row_index("row").filter(wrong)
        if not bad.is_empty():
            raise UserError(
                f"{file}, row {bad['row'][0]} ({bad['path'][0]}) has {what}: put it right, or prepare again."
            )
    return with_species_ids(table.with_columns(pl.col("is_training_img").cast(pl.Boolean)))


def species_names(table: pl.DataFrame) -> list[str]:
    """The species by label."""
    return table.select("species_id", "species_name").unique().sort("species_id")["species_name"].to_list()


def fingerprint(table: pl.DataFrame) -> str:
    """Identity of the records, labels and splits: equal for the same data wherever the folder lies."""
    rows = table.select("path", "species_name", pl.col("is_training_img").cast(pl.Int8)).sort("path")
    return hashlib.sha256(rows.write_csv().encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The photographs of one split, for random access: a `grain` data source.

    `size` is the side of every image in pixels; `labels` are int32 in [0, number of species); `rows` are the
    records' row numbers in the table.
    """

    folder: Path
    paths: list[str]
    labels: np.ndarray
    rows: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image = _read(self.folder / self.paths[index])
        if image.shape != (self.size, self.size, 3):
            raise UserError(
                f"{self.folder / self.paths[index]} is {image.shape}, unlike the other images of its split "
                f"({self.size} x {self.size}): prepare the folder again."
            )
        return {"image": image, "label": self.labels[index], "row": self.rows[index]}


def open_split(root: Path, table: pl.DataFrame, train: bool) -> Photographs:
    """The train or test photographs, after a look at the head and tail of every file."""
    split = table.with_row_index("row").filter(pl.col("is_training_img") == train)
    if split.is_empty():
        raise UserError(f"{root / 'metadata.parquet'} has no {'training' if train else 'test'} images.")
    folder, paths = root / "cleaned_images", split["path"].to_list()
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
    return Photographs(
        folder,
        paths,
        split["species_id"].to_numpy().astype(np.int32),
        split["row"].to_numpy().astype(np.int32),
        sizes[0][0],
    )


def check_labels(photographs: Photographs, num_classes: int) -> None:
    """Raise UserError for a label that has no logit: the loss would be NaN without a word."""
    wrong = np.flatnonzero((photographs.labels < 0) | (photographs.labels >= num_classes))
    if len(wrong):
        index = wrong[0]
        raise UserError(
            f"row {photographs.rows[index]} ({photographs.paths[index]}) has label {photographs.labels[index]}, but "
            f"the model has {num_classes} classes (0 to {num_classes - 1})."
        )


def check_sizes(train: Photographs, test: Photographs, image_size: int) -> None:
    """Raise UserError when the model cannot be trained on crops of these images and tested on those."""
    if train.size < image_size or test.size != image_size:
        raise UserError(
            f"{train.folder}: training images are {train.size} px and test images {test.size} px, but the model takes "
            f"{image_size}: prepare one with --train_size={round(1.2 * image_size)} --test_size={image_size}."
        )


def train_batches(
    photographs: Photographs, batch_size: int, seed: int, start: int, workers: int, shard: grain.sharding.ShardOptions
) -> Iterator[dict[str, np.ndarray]]:
    """This host's block of each global batch from step `start` on, without end.

    The global batch is a pure function of (seed, step): blocks of all hosts put end to end are the same for any
    number of hosts and workers. Each epoch is a fresh permutation; batches run across its end.
    """
    blocks = (
        grain.MapDataset.source(photographs)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size // shard.shard_count, drop_remainder=True)[shard.shard_index :: shard.shard_count]
    )
    return _iterate(blocks.slice(slice(start, None)), workers)


def test_batches(
    photographs: Photographs, batch_size: int, workers: int, shard: grain.sharding.ShardOptions
) -> Iterator[dict[str, np.ndarray]]:
    """This host's blocks of the whole split in order; the last batch is filled up with records whose `mask` is 0."""
    total = -(-len(photographs) // batch_size) * batch_size

    def record(index: int) -> dict[str, np.ndarray]:
        real = index < len(photographs)
        return photographs[index if real else 0] | {"mask": np.float32(real)}

    blocks = grain.MapDataset.range(total).map(record).batch(batch_size // shard.shard_count)
    return _iterate(blocks[shard.shard_index :: shard.shard_count], workers)


def worker_count(workers: int) -> int:
    """-1 becomes one process for each CPU of the job's share but one; threads do when there are two or fewer."""
    share = cpu_share()
    return workers if workers >= 0 else (0 if share <= 2 else min(share - 1, 16))


def _iterate(blocks: grain.MapDataset, workers: int) -> Iterator[dict[str, np.ndarray]]:
    workers = worker_count(workers)
    if not flags.FLAGS.is_parsed():  # in a notebook; grain's worker pool reads its own flags
        flags.FLAGS.mark_as_parsed()
    # The buffer counts batches, and grain's default of 500 would hold tens of gigabytes.
    threads = 1 if workers else cpu_share()
    dataset = blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not workers:
        return iter(dataset)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return _deaf_to_signals(iter(dataset.mp_prefetch(options)))


def _deaf_to_signals(batches: grain.DatasetIterator) -> Iterator[dict[str, np.ndarray]]:
    """The batches of processes that the first one starts, which no SIGTERM or Ctrl-C ends.

    Slurm and the terminal signal every process of a job; the main one decides when its workers end. A process inherits
    the signals that its parent blocks, and so is deaf to them from its first instruction on.
    """
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")  # it frees what a stop leaves
    resource_tracker.ensure_running()  # which would unblock them, were it started later
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        first = next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with contextlib.closing(batches):
        yield first
        yield from batches


def _read(file: Path) -> np.ndarray:
    """uint8 (height, width, 3)."""
    try:
        data = file.read_bytes()
        # strict: a truncated file is an error, not a picture that is grey at the bottom
        return simplejpeg.decode_jpeg(data, strict=True) if data[:2] == b"\xff\xd8" else iio.imread(data)[..., :3]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it and run `main.py prepare` again.") from None


def _size(file: Path) -> tuple[int, int] | str:
    """(height, width) from the file's head, or what is wrong with it."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(4096)  # a prepared image says its size in the first kilobyte
            if head[:2] != b"\xff\xd8":
                return iio.improps(file).shape[:2]
            opened.seek(-2, 2)
            if opened.read() != b"\xff\xd9":
                return "is a truncated JPEG"
            return simplejpeg.decode_jpeg_header(head)[:2]
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
