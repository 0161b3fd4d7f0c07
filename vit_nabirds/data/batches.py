"""This host's batches of uint8 images, read in threads or worker processes; these must not use JAX."""

import contextlib
import functools
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from vit_nabirds.data.photographs import Photographs
from vit_nabirds.errors import ConfigError
from vit_nabirds.parallel.cpus import cpu_share

Batch = dict[str, np.ndarray]


def train_batches(
    photographs: Photographs, batch_size: int, seed: int, start: int, workers: int, shard: grain.sharding.ShardOptions
) -> Iterator[Batch]:
    """This host's block of the global batch of step `start` and of every later step, without end."""
    block = functools.partial(train_block, photographs, batch_size, seed, shard=shard)
    return _iterate(grain.MapDataset.range(start, sys.maxsize).map(block), workers, photographs.is_packed)


def train_block(
    photographs: Photographs, batch_size: int, seed: int, step: int, shard: grain.sharding.ShardOptions
) -> Batch:
    """This host's block of the global batch of a step: see `Photographs.read` for image, label and row.

    The global batch, all hosts' blocks end to end, depends on seed and step only, not on the number of hosts or
    workers. Each epoch is a new permutation; a batch may span two epochs.
    """
    epochs, places = np.divmod(_positions(step, batch_size, shard), len(photographs))
    orders = [
        _epoch_order(seed, epoch, len(photographs))[places[epochs == epoch]]
        for epoch in range(epochs[0], epochs[-1] + 1)
    ]
    return photographs.read(np.concatenate(orders))


@functools.lru_cache(4)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    # Grain's own shuffle takes 30 us per index, longer than reading an image from a pack. RandomState's stream is
    # frozen (NumPy's NEP 19), so that a run can resume with another NumPy.
    return np.random.RandomState([seed, epoch]).permutation(length)


def test_batches(
    photographs: Photographs, batch_size: int, workers: int, shard: grain.sharding.ShardOptions
) -> Iterator[Batch]:
    """This host's blocks of the split in order, with `mask`, float32 (n,): 0 marks padding of the last batch."""
    block = functools.partial(_test_block, photographs, batch_size, shard)
    steps = -(-len(photographs) // batch_size)
    return _iterate(grain.MapDataset.range(steps).map(block), workers, photographs.is_packed)


def _test_block(photographs: Photographs, batch_size: int, shard: grain.sharding.ShardOptions, step: int) -> Batch:
    positions = _positions(step, batch_size, shard)
    real = positions < len(photographs)
    return photographs.read(np.where(real, positions, 0)) | {"mask": real.astype(np.float32)}


def _positions(step: int, batch_size: int, shard: grain.sharding.ShardOptions) -> np.ndarray:
    """The positions of this host's block of a step in the sequence of all global batches, as int (n,)."""
    share = batch_size // shard.shard_count
    return step * batch_size + shard.shard_index * share + np.arange(share)


def check_workers(workers: int) -> None:
    """Raise ConfigError for more worker processes than this machine can feed."""
    most = 4 * cpu_share()
    if not -1 <= workers <= most:
        raise ConfigError(
            f"config.data.workers is {workers}: it must be -1 (automatic), 0 (threads) or at most {most} processes."
        )


def worker_count(workers: int, is_packed: bool = False) -> int:
    """The number of worker processes, 0 for threads. -1 leaves one core free, and means 0 for a pack or two cores."""
    check_workers(workers)
    share = cpu_share()
    return workers if workers >= 0 else (0 if share <= 2 or is_packed else min(share - 1, 16))


def _iterate(blocks: grain.MapDataset, workers: int, is_packed: bool = False) -> Iterator[Batch]:
    workers = worker_count(workers, is_packed)
    if not flags.FLAGS.is_parsed():  # in a notebook; Grain's worker pool reads its own flags
        flags.FLAGS.mark_as_parsed()
    # The buffer counts batches: Grain's default of 500 would hold tens of gigabytes. One thread reads 15 to 30
    # thousand images of 269 px a second from a pack; two wait for each other and read half to two thirds of that.
    threads = 1 if workers or is_packed else cpu_share()
    dataset = blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not workers:
        return iter(dataset)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return _without_signals(iter(dataset.mp_prefetch(options)))


def _without_signals(batches: grain.DatasetIterator) -> Iterator[Batch]:
    """Keep SIGTERM and Ctrl-C from the worker processes, which the first batch starts.

    Slurm and the terminal signal every process of a job, but the main process decides when its workers end. A process
    inherits the signals that its parent blocks, and so ignores them from its first instruction on.
    """
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")  # it cleans up after a stop
    resource_tracker.ensure_running()  # started later, it would unblock the signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        first = next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with contextlib.closing(batches):
        yield first
        yield from batches
