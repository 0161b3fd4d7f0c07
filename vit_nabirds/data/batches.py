"""A prepared folder -> this host's batches of uint8 images. Free of JAX, for worker processes import it."""

import contextlib
import dataclasses
import functools
import hashlib
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import grain
import numpy as np
import polars as pl
from absl import flags

from vit_nabirds.data.archive import with_species_ids
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.errors import UserError
from vit_nabirds.data.images import ImageFiles, PackedImages, open_images, read_prepared

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
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
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


def fingerprint(root: Path, table: pl.DataFrame) -> str:
    """Identity of the records, labels and splits, and of how the images were made; the folder may lie anywhere."""
    rows = table.select("path", "species_name", pl.col("is_training_img").cast(pl.Int8)).sort("path")
    return hashlib.sha256((rows.write_csv() + read_prepared(root)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The photographs of one split, for random access.

    `labels` are int32 in [0, number of species); `rows` are the records' row numbers in the table.
    """

    images: ImageFiles | PackedImages
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """The side of every image in pixels."""
        return self.images.size

    @property
    def paths(self) -> list[str]:
        return self.images.paths

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.read(np.array([index])).items()}

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The records of int (n,) indices: image uint8 (n, size, size, 3), label and row int32 (n,)."""
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for index, image in zip(indices, images, strict=True):
            self.images.read(index, image)
        return {"image": images, "label": self.labels[indices], "row": self.rows[indices]}

    @property
    def is_packed(self) -> bool:
        return isinstance(self.images, PackedImages)


def open_split(root: Path, table: pl.DataFrame, train: bool) -> Photographs:
    """The train or test photographs: of the folder's pack, or of its image files after a look at every one."""
    split = table.with_row_index("row").filter(pl.col("is_training_img") == train)
    if split.is_empty():
        raise UserError(f"{root / 'metadata.parquet'} has no {'training' if train else 'test'} images.")
    return Photographs(
        open_images(root, split["path"].to_list(), train),
        split["species_id"].to_numpy().astype(np.int32),
        split["row"].to_numpy().astype(np.int32),
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
            f"{train.images.folder}: training images are {train.size} px and test images {test.size} px, but the model "
            f"takes {image_size}: prepare one with --train_size={round(1.2 * image_size)} --test_size={image_size}."
        )


def train_batches(
    photographs: Photographs, batch_size: int, seed: int, start: int, workers: int, shard: grain.sharding.ShardOptions
) -> Iterator[dict[str, np.ndarray]]:
    """This host's block of each global batch from step `start` on, without end.

    The global batch is a pure function of (seed, step): blocks of all hosts put end to end are the same for any
    number of hosts and workers. Each epoch is a fresh permutation; batches run across its end.
    """
    share = batch_size // shard.shard_count

    def block(step: int) -> dict[str, np.ndarray]:
        numbers = step * batch_size + shard.shard_index * share + np.arange(share)
        return photographs.read(_shuffled(numbers, seed, len(photographs)))

    return _iterate(grain.MapDataset.range(start, sys.maxsize).map(block), workers, photographs.is_packed)


def _shuffled(numbers: np.ndarray, seed: int, length: int) -> np.ndarray:
    """The records at int (n,) rising places in the sequence of all epochs, whose every epoch has its own order."""
    epochs, places = np.divmod(numbers, length)
    orders = [_order(seed, epoch, length)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate(orders)


@functools.lru_cache(4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    # Grain's own shuffle takes 30 us an index, more than reading an image from a pack does. RandomState's stream is
    # frozen (NumPy's NEP 19): a run may go on with another NumPy.
    return np.random.RandomState([seed, epoch]).permutation(length)


def test_batches(
    photographs: Photographs, batch_size: int, workers: int, shard: grain.sharding.ShardOptions
) -> Iterator[dict[str, np.ndarray]]:
    """This host's blocks of the whole split in order; the last batch is filled up with records whose `mask` is 0."""
    share = batch_size // shard.shard_count

    def block(step: int) -> dict[str, np.ndarray]:
        indices = step * batch_size + shard.shard_index * share + np.arange(share)
        real = indices < len(photographs)
        return photographs.read(np.where(real, indices, 0)) | {"mask": real.astype(np.float32)}

    blocks = grain.MapDataset.range(-(-len(photographs) // batch_size)).map(block)
    return _iterate(blocks, workers, photographs.is_packed)


def worker_count(workers: int, is_packed: bool = False) -> int:
    """-1 becomes one process for each CPU of the job's share but one; threads do for two or fewer, or for a pack."""
    share = cpu_share()
    return workers if workers >= 0 else (0 if share <= 2 or is_packed else min(share - 1, 16))


def _iterate(blocks: grain.MapDataset, workers: int, is_packed: bool = False) -> Iterator[dict[str, np.ndarray]]:
    workers = worker_count(workers, is_packed)
    if not flags.FLAGS.is_parsed():  # in a notebook; grain's worker pool reads its own flags
        flags.FLAGS.mark_as_parsed()
    # The buffer counts batches, and grain's default of 500 would hold tens of gigabytes. Of a pack, one thread reads
    # 15 to 30 thousand images of 269 px a second; two wait for each other and read half to two thirds of that.
    threads = 1 if workers or is_packed else cpu_share()
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
