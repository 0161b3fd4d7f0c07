"""A whole training: set up, run, report."""

import contextlib
import functools
import json
import logging
import signal
import time
from pathlib import Path

import grain
import jax
import numpy as np
import polars as pl

from vit_nabirds.config import Config
from vit_nabirds.data.batches import train_block
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.data.table import SKIPPED, left_out_of
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.locks import lock
from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest
from vit_nabirds.parallel.watchdog import Watchdog
from vit_nabirds.recipe.rules import describe_rules
from vit_nabirds.runs.checkpoints import Checkpoints, damage_set_aside, free_name
from vit_nabirds.runs.compiled import keep_compiled
from vit_nabirds.runs.files import write_json
from vit_nabirds.runs.record import record_start
from vit_nabirds.runs.selection import PREDICTIONS
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training.evaluator import Evaluator
from vit_nabirds.training.loop import fit
from vit_nabirds.training.reporter import Reporter
from vit_nabirds.training.run import Run, prepare_run
from vit_nabirds.training.saver import Saver
from vit_nabirds.training.step import augmented, is_mixed
from vit_nabirds.training.tracer import Tracer

log = logging.getLogger("vit_nabirds")

FINISHED = 0


def train(
    config: Config, workdir: Path, group: ProcessGroup, accept_changes: bool = False, from_step: int | None = None
) -> int:
    """Train or resume the run in `workdir`; returns the exit code: 0 finished, 75 stopped with everything saved.

    With `accept_changes` it goes on with another recipe, and from an earlier checkpoint, `from_step`.
    """
    with contextlib.ExitStack() as stack:
        signals = {signal.Signals[f"SIG{name}"] for name in config.stop_signals.split(",")}
        stop = stack.enter_context(StopRequest(group.is_writer, signals))
        timeout = config.watchdog_timeout.seconds
        watchdog = stack.enter_context(Watchdog(timeout, group, lambda: stop.requested))
        if config.data.synthetic:
            with group.writer_first("drawing"):
                prepare_synthetic(Path(config.data.root), config.model.image_size)
        with damage_set_aside(workdir, is_locked=False):
            run = prepare_run(config, workdir, group, accept_changes=accept_changes, from_step=from_step)
        loaded = run.pretrained_params()

        # Everything is known to be right: from here on the run writes.
        workdir.mkdir(parents=True, exist_ok=True)
        if group.is_writer:
            busy = f"another process trains in {workdir} right now: wait for its end, or use another --workdir."
            stack.enter_context(lock(workdir / "lock", busy))
            leave_later(workdir, run.saved_steps)
        group.check_shared(workdir / "lock")
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir / "checkpoints")))
        stack.push(group.end_if_several)  # or an error would wait for the other processes in the line above
        if checkpoints.steps != run.saved_steps:
            raise UserError(f"another process has just trained in {workdir}: run the same command again.")
        if run.goes_on:  # also after an end that patience brought
            run.selection.tests.clear()
        if group.is_writer:
            if run.goes_on:
                for name in ("results.json", PREDICTIONS):
                    (workdir / name).unlink(missing_ok=True)
            write_json(workdir / "config.json", run.metadata.config)
            run.selection.write()
        keep_compiled(workdir / "compiled", group.is_writer)
        checkpoints.keep = run.selection.keep
        with damage_set_aside(workdir):
            state = run.restore(checkpoints, loaded) if run.saved_steps else run.first_state(loaded)
        del loaded
        tracker = stack.enter_context(contextlib.closing(Tracker(workdir, run.plan, run.start, group.is_writer)))
        introduce(run, tracker, group)

        reporter = Reporter(run, tracker)
        saver = Saver(run, checkpoints, watchdog, group)
        evaluator = Evaluator(run, tracker, checkpoints, stop, watchdog, group.is_writer)
        tracer = stack.enter_context(contextlib.closing(make_tracer(run, group)))
        batches = stack.enter_context(contextlib.closing(run.batches(watchdog.waits_for)))
        step = fit(run, state, batches, reporter, saver, evaluator, tracer, stop)
        saver.finish()
        reporter.check(step)

        ended = step == run.plan.total_steps or run.has_converged
        results = evaluator.finish(step) if ended and not evaluator.is_behind(step) else None
        if results is None:
            when = f" {time.monotonic() - stop.since:.1f} s after the signal" if stop.requested else ""
            total = run.plan.total_steps
            log.info("stopped at step %d of %d, all saved%s: run the same command again to resume", step, total, when)
            return EXIT_STOPPED
        if group.is_writer:
            write_json(workdir / "results.json", results)
    log.info("finished: %s", in_words(results, run.plan.total_steps))
    return FINISHED


def leave_later(workdir: Path, steps: list[int]) -> None:
    """Move the checkpoints after the last of these steps to WORKDIR/left, where no run reads them."""
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        if steps and folder.name.isdecimal() and int(folder.name) > steps[-1]:
            (workdir / "left").mkdir(exist_ok=True)
            place = free_name(workdir / "left" / folder.name)
            folder.rename(place)
            log.info("the checkpoint of step %s lies in %s now", folder.name, place)


def prepare_synthetic(root: Path, image_size: int) -> None:
    """Draw an archive of invented photographs and prepare it as `root`, unless that has been done."""
    if not holds_birds(root):
        log.info("drawing photographs of birds into %s", root)
        draw_archive(root / "archive", species=8, train=80, test=30)
        prepare(root / "archive", root, train_size=round(1.2 * image_size), test_size=image_size)


def holds_birds(root: Path) -> bool:
    """Whether it is prepared; ConfigError if it is neither that nor a place for drawn birds."""
    if (root / "metadata.parquet").exists():
        return True
    if root.is_dir() and any(root.iterdir()) and not (root / "archive").exists():
        raise ConfigError(f"config.data.root is {root}, which holds other files: birds are drawn into a new folder.")
    return False


def introduce(run: Run, tracker: Tracker, group: ProcessGroup) -> None:
    """What a reader of the log and of TensorBoard wants to know first, with the pictures of the first batch."""
    shapes, config, plan, facts = run.model.shapes, run.config, run.plan, run.facts
    log.info(
        "%s: %s; %s parameters, %s of them trained, in %s; steps %d to %d on %d %s device(s) of %d process(es)%s",
        run.workdir, run.data_in_words, f"{facts['parameters']:,}", f"{facts['trained']:,}", config.compute_dtype,
        run.start, plan.total_steps, run.mesh.size, jax.default_backend(), group.num_processes, memory_in_words(run),
    )  # fmt: skip
    if left_out := left_out_of(root := Path(config.data.root)):
        log.warning("%d photographs were left out when the data were prepared: %s", left_out, root / SKIPPED)
    if run.validation_split and (missing := run.model.num_classes - len(np.unique(run.validation_split.labels))):
        log.warning("%d of the classes have no validation photograph (docs/data.md says why)", missing)
    for line in describe_rules(run.rules, shapes):
        log.info("  %s", line)
    tracker.text("config", f"```\n{json.dumps(run.metadata.config, indent=2)}\n```")
    if group.is_writer and run.start < plan.total_steps:
        record_start(run.workdir, run.start, run.mesh.devices.flatten().tolist(), group.num_processes, facts)
        # The first 16 or so of the global batch, as one of many hosts would read them.
        shard = grain.sharding.ShardOptions(0, max(1, config.batch_size // 16))
        batch = train_block(
            run.train_split, config.batch_size, config.seed, run.start, shard, config.data.tolerated is not None,
            config.data.sampling, config.data.repeats,
        )  # fmt: skip
        count = 2 * (len(batch["row"]) // 2) or 1  # images are mixed in pairs
        shown, _ = jax.jit(functools.partial(augmented, config, run.model))(
            run.start, batch["image"][:count], batch["label"][:count], np.arange(count)
        )
        captions = (
            run.table[batch["row"][:count].tolist()].select("class_name", pl.col("photographer").fill_null("")).rows()
        )
        if is_mixed(config):  # each is in the picture of its neighbour too
            captions = [tuple(map(" + ".join, zip(captions[i], captions[i ^ 1], strict=True))) for i in range(count)]
        tracker.images("train/augmented", run.start, np.asarray(shown), captions)


def memory_in_words(run: Run) -> str:
    """What the run does to save memory, for the log."""
    config, fsdp = run.config, run.mesh.shape["fsdp"]
    words = [f"parameters shared by {fsdp}"] * (fsdp > 1) + [f"microbatch {config.microbatch}"] * (
        config.microbatch != 0
    )
    words += [f"remat {config.remat}"] * (config.remat != "none")
    return "".join(f", {word}" for word in words)


def make_tracer(run: Run, group: ProcessGroup) -> Tracer:
    """Of the steps of config.profile that are not done yet; the writer's."""
    steps, folder = run.plan.traced, run.workdir / "tensorboard"
    left = range(max(steps.start, run.start + 1), steps.stop) if group.is_writer else range(0)
    if steps:
        what = f"goes to {folder}" if left else "is not made: they are done already"
        log.info("a trace of steps %s %s", run.config.profile, what)
    return Tracer(left, folder)


def in_words(results: dict, planned: int) -> str:
    """The end of a training, for the log."""
    selected, last, test = results["selected"], results["last"], results["test"]
    step, (low, high) = selected["step"], test["accuracy_interval"]
    accuracy = f"accuracy {test['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f}) on {test['examples']} test photographs"
    if not selected["metric"]:
        return f"{accuracy} at step {step}, {selected['why']}"
    text = f"{accuracy} at step {step}, selected by {selected['metric']} {selected['value']:.4f}"
    if last["step"] != step:
        text += f"; at step {last['step']}, the last, {last['test']['accuracy']:.4f}"
    return text + (f"; not better since, so {planned - last['step']} steps were left out" * (last["step"] < planned))
