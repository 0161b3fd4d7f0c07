"""What the frozen model sees in each photograph: computed once, kept beside the run."""

import contextlib
import json
import logging
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vit_nabirds.data.batches import eval_batches
from vit_nabirds.data.photographs import Photographs, open_split
from vit_nabirds.data.table import SPLIT
from vit_nabirds.data.unread import Unread
from vit_nabirds.evaluation.views import views
from vit_nabirds.files import crc32_of, written_whole
from vit_nabirds.models.normalization import to_float, zscore
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.runs.checkpoints import digest
from vit_nabirds.training.run import Run

log = logging.getLogger("vit_nabirds")


class Features(NamedTuple):
    """Of the photographs of a split that could be read, in the order of the table."""

    values: np.ndarray  # float32 (n, width): what the classifier sees
    labels: np.ndarray  # int32 (n,)


def features_of(run: Run, params: dict, split: str, folder: Path, stop: StopRequest) -> Features | None:
    """Of "train" or "validation", each photograph cut to the bird as a test image is. None after a request to stop.

    Those of "validation" are means over config.evaluate.views: logits of a mean are the mean of the logits.
    They are read from `folder`, or computed on all devices and written there. A file that is damaged, or of other
    photographs, weights or settings, is computed again.
    """
    kind = run.config.evaluate.views if split == "validation" else "one"
    file, key = folder / f"{split}.safetensors", _key(run, params, kind)
    if found := _read(file, key):
        log.info("the features of %s %s photographs are in %s", f"{len(found.labels):,}", split, file)
        return found
    photographs, started = frozen_split(run, split), time.monotonic()
    log.info("computing the features of %s %s photographs", f"{len(photographs):,}", split)
    if features := _computed(run, params, photographs, kind, stop):
        log.info("computed in %.1f s", time.monotonic() - started)
        _write(file, key, features)
    return features


def frozen_split(run: Run, split: str) -> Photographs:
    """The photographs of "train" or "validation", both cut and fitted as those of "validation" are."""
    as_validation = pl.when(pl.col("split") == split).then(pl.lit("validation")).otherwise(pl.lit("test"))
    return open_split(Path(run.config.data.root), run.table.with_columns(split=as_validation.cast(SPLIT)), "validation")


def _computed(run: Run, params: dict, photographs: Photographs, kind: str, stop: StopRequest) -> Features | None:
    unread, parts, labels = Unread(photographs, run.config.data.tolerated), [], []
    size = -(-run.config.batch_size // run.mesh.size) * run.mesh.size
    shard, forward = grain.sharding.ShardByJaxProcess(drop_remainder=True), _forward(run, kind)
    batches = eval_batches(photographs, size, run.config.data.workers, shard, unread.are_tolerated)
    with contextlib.closing(batches):
        for batch in unread.watch(batches):
            if stop.requested:
                return None
            image = devices.to_devices({"image": batch["image"]}, run.mesh)["image"]
            if parts:  # the host must not run ahead of the devices and hold the whole split there
                parts[-1] = np.asarray(parts[-1])
            parts.append(forward(params, image))
            labels.append(np.where(batch["mask"] > 0, batch["label"], -1))
    values, labels = np.concatenate(parts), np.concatenate(labels)
    there = labels >= 0
    unread.check(len(photographs) - int(there.sum()))
    return Features(values[there], labels[there].astype(np.int32))


def _forward(run: Run, kind: str) -> Callable:
    """Jitted (params, uint8 images (n, size, size, 3)) -> float32 features (n, width), means over the views."""

    def forward(params: dict, images: jax.Array) -> jax.Array:
        seen = zscore(views(to_float(images), kind), run.metadata.normalization)
        see = run.model.bind(params).features
        return jax.lax.map(see, seen).mean(0) if len(seen) > 1 else see(seen[0])

    return run.model.jit(forward)


def _key(run: Run, params: dict, kind: str) -> str:
    """All that decides what the features are."""
    weights = {path: x for path, x in params.items() if not path.startswith("classifier/")}
    sums = {path: found.checksum for path, found in digest({"params": weights})["params"].items()}
    metadata = run.metadata
    key = {
        "data": metadata.fingerprint, "weights": crc32_of(sums), "architecture": metadata.architecture,
        "normalization": [metadata.normalization.mean, metadata.normalization.std],
        "compute_dtype": run.config.compute_dtype, "views": kind,
    }  # fmt: skip
    return json.dumps(key, sort_keys=True)


def _read(file: Path, key: str) -> Features | None:
    """None, with a reason in the log, for what is not there whole or is of something else."""
    try:
        with safe_open(file, framework="np") as opened:
            found, stored = (
                Features(*(opened.get_tensor(name) for name in Features._fields)),
                opened.metadata() or {},
            )
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        problem = str(error)
    else:
        if stored == _described(found, key):
            return found
        same = stored.get("key") == key
        problem = "its checksum is wrong" if same else "they are of other photographs, weights or settings"
    log.warning("the features in %s cannot be used (%s)", file, problem)
    return None


def _write(file: Path, key: str, features: Features) -> None:
    file.parent.mkdir(exist_ok=True)
    with written_whole(file) as partial:
        save_file(features._asdict(), partial, metadata=_described(features, key))


def _described(features: Features, key: str) -> dict[str, str]:
    values, labels = (np.ascontiguousarray(array) for array in features)
    return {"key": key, "crc32": str(zlib.crc32(labels, zlib.crc32(values)))}
