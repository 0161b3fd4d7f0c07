"""This host's batches of uint8 images, read in threads or worker processes; these must not use JAX."""

import contextlib
import functools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

import grain
import numpy as np
from absl import flags

from vit_nabirds.data.photographs import Photographs
from vit_nabirds.data.sampling import epoch_order
from vit_nabirds.errors import WORKER_LOST, ConfigError, UserError
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.parallel.launchers import processes_of_first_node
from vit_nabirds.parallel.preemption import SIGNALS

log = logging.getLogger("vit_nabirds")

Batch = dict[str, np.ndarray]
BUFFER = 2  # batches that wait for the training, of each worker
REPLACED = 3  # times in a row that workers are replaced without a batch in between
PHOTOGRAPHS = "photographs"  # what a process waits for
Waiting = Callable[..., contextlib.AbstractContextManager]  # (what, remedy), as Watchdog.waits_for
SHARED = Path("/dev/shm")
TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"  # it cleans up after a stop
_TRIES = 32  # photographs in a row; if none of them can be read, the storage has failed


def unwatched(what: str, remedy: Callable[[], object] | None = None) -> contextlib.AbstractContextManager:
    """A wait that may last for ever."""
    return contextlib.nullcontext()


def train_batches(
    photographs: Photographs,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    shard: grain.sharding.ShardOptions,
    skip: bool = False,
    sampling: str = "uniform",
    repeats: int = 1,
    waits_for: Waiting = unwatched,
) -> Iterator[Batch]:
    """This host's block of the global batch of step `start` and of every later step, without end."""
    check_repeats(batch_size, repeats)
    block = functools.partial(
        train_block, photographs, batch_size, seed, shard=shard, skip=skip, sampling=sampling, repeats=repeats
    )
    workers = worker_count(workers, photographs.is_packed, batch_bytes(photographs, batch_size, shard))
    return _iterate(block, range(start, sys.maxsize), workers, photographs.is_packed, waits_for)


def train_block(
    photographs: Photographs,
    batch_size: int,
    seed: int,
    step: int,
    shard: grain.sharding.ShardOptions,
    skip: bool = False,
    sampling: str = "uniform",
    repeats: int = 1,
) -> Batch:
    """This host's block of the global batch of a step, as `_read` gives it.

    The global batch, all hosts' blocks end to end, depends on seed and step only, not on the number of hosts or
    workers. Each epoch is a new order (`epoch_order`); a batch may span two epochs. With `skip`, the next photograph of
    the epoch takes the place of one that cannot be read; without it that is a UserError.

    With `repeats`, a batch has batch_size / repeats draws, one after another, and again from the first (Hoffer et al.,
    2020), so that neighbours differ. The order of an epoch then lasts for `repeats` times as many images.
    """
    each = batch_size // repeats
    places = _positions(0, batch_size, shard) % each
    draws, copies = np.unique(places, return_inverse=True) if repeats > 1 else (places, None)
    batch = _read(photographs, _candidates(photographs, seed, step * each + draws, sampling, _TRIES if skip else 1))
    return batch if copies is None else {name: values[copies] for name, values in batch.items()}


def rows_of_step(
    photographs: Photographs, batch_size: int, seed: int, step: int, sampling: str = "uniform", repeats: int = 1
) -> list[int]:
    """Rows of the photographs in the global batch of a step, each once, if all of them can be read."""
    each = batch_size // repeats
    slots = _candidates(photographs, seed, step * each + np.arange(each), sampling, tries=1)
    return photographs.rows[np.concatenate(slots)].tolist()


def _candidates(photographs: Photographs, seed: int, draws: np.ndarray, sampling: str, tries: int) -> list[np.ndarray]:
    """For each draw of the training, counted from its start, its photograph and those that may take its place."""
    epochs, places = np.divmod(draws, len(photographs))
    orders = {epoch: epoch_order(seed, int(epoch), photographs.labels, sampling) for epoch in set(epochs)}
    places = places[:, None] + np.arange(tries)
    return [orders[epoch][place % len(photographs)] for epoch, place in zip(epochs, places, strict=True)]


def check_repeats(batch_size: int, repeats: int) -> None:
    """Raise ConfigError if a batch cannot hold each of its photographs equally often."""
    if batch_size % repeats:
        raise ConfigError(
            f"config.data.repeats is {repeats}, which does not divide config.batch_size = {batch_size}: change one of "
            "the two."
        )


def eval_batches(
    photographs: Photographs,
    batch_size: int,
    workers: int,
    shard: grain.sharding.ShardOptions,
    skip: bool = False,
    waits_for: Waiting = unwatched,
) -> Iterator[Batch]:
    """This host's blocks of the split in order, with `mask`, float32 (n,).

    It is 0 for the padding of the last batch and, with `skip`, for what cannot be read.
    """
    block = functools.partial(_eval_block, photographs, batch_size, shard, skip)
    steps = -(-len(photographs) // batch_size)
    own = batch_bytes(photographs, batch_size, shard)
    workers = worker_count(workers, photographs.is_packed, own, beside_training=True)
    return _iterate(block, range(steps), workers, photographs.is_packed, waits_for)


def _eval_block(
    photographs: Photographs, batch_size: int, shard: grain.sharding.ShardOptions, skip: bool, step: int
) -> Batch:
    positions = _positions(step, batch_size, shard)
    batch = _read(photographs, [[i] if i < len(photographs) else [] for i in positions], may_be_blank=skip)
    return batch | {"mask": (batch["row"] >= 0).astype(np.float32)}


def _read(photographs: Photographs, slots: list[Sequence[int]], may_be_blank: bool = False) -> Batch:
    """For each slot the first of its photographs that can be read: image, uint8 (n, size, size, 3), label and row,
    int32 (n,); and `unread`, int32 (n,), the row of its first photograph if that could not be read, else -1.

    A slot without photographs is black, its row -1. One of which none can be read is so too, or a UserError.
    """
    side = photographs.size
    batch = {"image": np.zeros((len(slots), side, side, 3), np.uint8), "label": np.zeros(len(slots), np.int32)}
    batch |= {name: np.full(len(slots), -1, np.int32) for name in ("row", "unread")}
    for slot, candidates in enumerate(slots):
        for index in candidates:
            try:
                photographs.read(index, batch["image"][slot])
            except UserError as error:
                problem = error
                if batch["unread"][slot] < 0:
                    batch["unread"][slot] = photographs.rows[index]
            else:
                batch["label"][slot], batch["row"][slot] = photographs.labels[index], photographs.rows[index]
                break
        else:
            batch["image"][slot] = 0
            if len(candidates) and not may_be_blank:
                raise problem
    return batch


def _positions(step: int, batch_size: int, shard: grain.sharding.ShardOptions) -> np.ndarray:
    """The positions of this host's block of a step in the sequence of all global batches, as int (n,)."""
    share = batch_size // shard.shard_count
    return step * batch_size + shard.shard_index * share + np.arange(share)


def batch_bytes(photographs: Photographs, batch_size: int, shard: grain.sharding.ShardOptions) -> int:
    """Of the images of this host's block of a batch."""
    return batch_size // shard.shard_count * photographs.size**2 * 3


def check_workers(workers: int) -> None:
    """Raise ConfigError for more worker processes than this machine can feed."""
    most = 4 * cpu_share()
    if not -1 <= workers <= most:
        raise ConfigError(
            f"config.data.workers is {workers}: it must be -1 (automatic), 0 (threads) or at most {most} processes."
        )


def worker_count(
    workers: int, is_packed: bool = False, batch_bytes: int = 0, shared: Path = SHARED, beside_training: bool = False
) -> int:
    """The number of worker processes, 0 for threads. -1 leaves one core free, and means 0 for a pack or two cores.

    Workers pass batches on in shared memory, of which the tasks of a node have equal parts. -1 takes as many as fit
    there, and so does an evaluation; ConfigError if those asked for do not.
    """
    check_workers(workers)
    share = cpu_share()
    wanted = workers if workers >= 0 else (0 if share <= 2 or is_packed else min(share - 1, 16))
    free, each, tasks = math.inf, (BUFFER + 2) * batch_bytes, processes_of_first_node()
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        free = usage.free / tasks if beside_training else min(usage.free, usage.total / tasks)
    fitting = wanted if wanted * each <= free else int(free // each)
    if fitting < wanted and workers > 0 and not beside_training:
        raise ConfigError(
            f"config.data.workers is {workers}, whose batches need {wanted * each / 2**20:,.0f} MiB of {shared}, but "
            f"{free / 2**20:,.0f} MiB are free there: use at most {fitting} (0: threads), pack the folder (`prepare "
            "--pack`), or make it larger (docker run --shm-size)."
        )
    return fitting


def _iterate(
    block: Callable[[int], Batch], steps: range, workers: int, is_packed: bool, waits_for: Waiting
) -> Iterator[Batch]:
    """The blocks of these steps. Worker processes that are killed or hang are replaced: a block is a function of its
    step."""
    done, failures = 0, 0
    while True:
        others = multiprocessing.active_children()
        batches = _start(block, steps[done:], workers, is_packed)
        try:
            with contextlib.closing(batches):
                while True:
                    remedy = functools.partial(_kill_all_but, others) if workers else None
                    with waits_for(PHOTOGRAPHS, remedy):
                        if (batch := next(batches, None)) is None:
                            return
                    yield batch
                    done, failures = done + 1, 0
        except RuntimeError as error:  # of Grain
            failures += 1
            if WORKER_LOST not in str(error) or failures > REPLACED:
                raise
            log.warning("a process that reads photographs was killed or hung: new ones go on (%d)", failures)


def _kill_all_but(others: list[multiprocessing.Process]) -> None:
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()


def _start(block: Callable[[int], Batch], steps: range, workers: int, is_packed: bool) -> Iterator[Batch]:
    blocks = grain.MapDataset.range(steps.start, steps.stop).map(functools.partial(_in_worker, block))
    if not flags.FLAGS.is_parsed():  # in a notebook; Grain's worker pool reads its own flags
        flags.FLAGS.mark_as_parsed()
    # The buffer counts batches: Grain's default of 500 would hold tens of gigabytes. One thread reads 15 to 30
    # thousand images of 269 px a second from a pack; two wait for each other and read half to two thirds of that.
    threads = 1 if workers or is_packed else cpu_share()
    dataset = blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if not workers:
        return iter(dataset)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BUFFER)
    return _without_signals(iter(dataset.mp_prefetch(options)))


def _in_worker(block: Callable[[int], Batch], step: int) -> Batch:
    _end_with_parent()
    return block(step)


@functools.cache
def _end_with_parent() -> None:
    """In a worker process: do not outlive the training, also when it was killed and told nobody."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _without_signals(batches: grain.DatasetIterator) -> Iterator[Batch]:
    """Keep SIGNALS from the worker processes, which the first batch starts.

    Slurm and the terminal signal every process of a job, but the main process decides when its workers end. A process
    inherits the signals that its parent blocks, and so ignores them from its first instruction on.
    """
    if TRACKER not in sys.warnoptions:
        sys.warnoptions.append(TRACKER)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # it unblocks two of the signals, also where it is started later
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        first = next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with contextlib.closing(batches):
        yield first
        yield from batches
