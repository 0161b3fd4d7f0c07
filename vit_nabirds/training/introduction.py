"""What a training says before its first step: to the log, and to the trackers."""

import dataclasses
import functools
import logging
import shlex
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import numpy as np
import polars as pl

from vit_nabirds.config.fields import FREE_ON_RESUME, fields, flat
from vit_nabirds.data.batches import train_block
from vit_nabirds.data.table import SKIPPED, left_out_of
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.recipe.rules import describe_rules
from vit_nabirds.runs.markdown import as_table
from vit_nabirds.runs.pictures import draw_row
from vit_nabirds.runs.record import record_start
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.runs.trackers import RunInfo
from vit_nabirds.training.run import Run
from vit_nabirds.training.step import augmented, is_mixed

log = logging.getLogger("vit_nabirds")

SHOWN = 4  # photographs in a picture: TensorBoard shows them small


def introduce(run: Run, group: ProcessGroup, tensorboard: str) -> None:
    """What is about to happen, and where to look, for the log."""
    config, plan, facts = run.config, run.plan, run.facts
    log.info(
        "%s: %s; %s parameters, %s of them trained, in %s; steps %d to %d on %d %s device(s) of %d process(es)%s",
        run.workdir, run.data_in_words, f"{facts['parameters']:,}", f"{facts['trained']:,}", config.compute_dtype,
        run.start, plan.total_steps, run.mesh.size, jax.default_backend(), group.num_processes, memory_in_words(run),
    )  # fmt: skip
    if left_out := left_out_of(root := Path(config.data.root)):
        log.warning("%d photographs were left out when the data were prepared: %s", left_out, root / SKIPPED)
    if run.validation_split and (missing := run.model.num_classes - len(np.unique(run.validation_split.labels))):
        log.warning("%d of the classes have no validation photograph (docs/data.md says why)", missing)
    for line in describe_rules(run.rules, run.model.shapes):
        log.info("  %s", line)
    if run.goes_on:
        lines = [
            f"  evaluates  every {config.evaluate.every}; saves every {config.checkpoint.every}, and at the end",
            f"  curves     {tensorboard} --logdir={shlex.quote(str(run.workdir))}",
            f"  figures    {run.workdir / 'metrics.jsonl'}",
            "  to stop    Ctrl-C, or SIGTERM: all is saved, and the same command goes on",
        ]
        if servers := [name for name in config.track if name != "tensorboard"]:
            lines.append(f"  also to    {', '.join(servers)}")
        log.info("%s", "\n".join(["what happens:", *lines]))


def memory_in_words(run: Run) -> str:
    """What the run does to save memory, for the log."""
    config, fsdp = run.config, run.mesh.shape["fsdp"]
    words = [f"parameters shared by {fsdp}"] * (fsdp > 1) + [f"microbatch {config.microbatch}"] * (
        config.microbatch != 0
    )
    words += [f"remat {config.remat}"] * (config.remat != "none")
    return "".join(f", {word}" for word in words)


def info_of(run: Run, experiment: str) -> RunInfo:
    changed, usual = _by_default(run)
    params = {name: value for name, value, _ in [*changed, *usual] if not FREE_ON_RESUME.fullmatch(name)}
    params = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in params.items()}
    return RunInfo(run.workdir, experiment, run.start, params, len(run.metadata.history))


def make_tracker(
    run: Run,
    start: int,
    experiment: str,
    group: ProcessGroup,
    saved: Callable[[], int | None] = lambda: None,
) -> Tracker:
    """Of a run that goes on from step `start`."""
    info = dataclasses.replace(info_of(run, experiment), start=start)
    return Tracker(info, run.plan, run.config.track, group.is_writer, saved)


def _by_default(run: Run) -> tuple[list[tuple], list[tuple]]:
    """(field, value, default) of the fields that differ from their defaults, and of the others."""
    defaults = {name: field.metadata["default"] for name, field in fields()}
    rows = [(name, value, defaults[name]) for name, value in flat(run.config.to_dict()).items()]
    changed = [row for row in rows if row[1] != row[2]]
    return changed, [row for row in rows if row[1] == row[2]]


def describe_start(run: Run, tracker: Tracker, group: ProcessGroup) -> None:
    """The run's configuration, what it is made with, and pictures of its first batch, for the trackers, unless
    nothing is left to train."""
    if not (group.is_writer and run.goes_on):
        return
    start = record_start(run.workdir, run.start, run.mesh.devices.flatten().tolist(), group.num_processes, run.facts)
    facts = vars(start) | {"data": run.data_in_words, "versions": ", ".join(map(" ".join, start.versions.items()))}
    del facts["time"]
    changed, usual = _by_default(run)
    tables = [
        as_table(changed, ("field", "value", "default")),
        as_table([row[:2] for row in usual], ("field at its default", "value")) if usual else "",
    ]
    tracker.text("config", "\n\n".join(tables))
    tracker.text("start", as_table(list(facts.items()), ("what", "value")))
    images, captions = first_batch(run)
    for name, first in (("train/augmented", 0), ("train/augmented_more", SHOWN)):
        if captions[first:]:
            row = slice(first, first + SHOWN)
            tracker.images(name, run.start, draw_row(images[row], captions[row]))


def first_batch(run: Run) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Photographs of the first global batch as the model sees them, with their captions."""
    config, most = run.config, 2 * SHOWN
    shard = grain.sharding.ShardOptions(0, max(1, config.batch_size // most))  # as one of many hosts would read them
    batch = train_block(
        run.train_split, config.batch_size, config.seed, run.start, shard, config.data.tolerated is not None,
        config.data.sampling, config.data.repeats,
    )  # fmt: skip
    count = 2 * (min(len(batch["row"]), most) // 2) or 1  # images are mixed in pairs
    shown, _ = jax.jit(functools.partial(augmented, config, run.model))(
        run.start, batch["image"][:count], batch["label"][:count], np.arange(count)
    )
    captions = captions_of(run.table[batch["row"][:count].tolist()])
    if is_mixed(config):  # each is in the picture of its neighbour too
        captions = [tuple(map(" + ".join, zip(captions[i], captions[i ^ 1], strict=True))) for i in range(count)]
    return np.asarray(shown), captions


def captions_of(table: pl.DataFrame) -> list[tuple[str, str]]:
    """Species and photographer of some rows."""
    return [(name, credit(photographer)) for name, photographer in table.select("class_name", "photographer").rows()]


def credit(photographer: str | None) -> str:
    return f"by {photographer or 'unknown'}"
