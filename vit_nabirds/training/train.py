"""A whole training: set up, run, report."""

import contextlib
import logging
import signal
import time
from pathlib import Path

from vit_nabirds.config import Config
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.errors import ConfigError, TransientError
from vit_nabirds.files import write_json
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.locks import lock
from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest
from vit_nabirds.parallel.watchdog import Watchdog
from vit_nabirds.runs.checkpoints import Checkpoints, damage_set_aside, free_name
from vit_nabirds.runs.compiled import keep_compiled
from vit_nabirds.runs.quantities import percent
from vit_nabirds.runs.selection import PREDICTIONS
from vit_nabirds.runs.trackers import check as check_trackers
from vit_nabirds.training.conclusion import conclude
from vit_nabirds.training.evaluator import Evaluator
from vit_nabirds.training.introduction import describe_start, introduce, make_tracker
from vit_nabirds.training.loop import fit
from vit_nabirds.training.reporter import Reporter
from vit_nabirds.training.run import Run, prepare_run
from vit_nabirds.training.saver import Saver
from vit_nabirds.training.tracer import Tracer

log = logging.getLogger("vit_nabirds")

FINISHED = 0


def train(
    config: Config,
    workdir: Path,
    group: ProcessGroup,
    accept_changes: bool = False,
    from_step: int | None = None,
    experiment: str = "train",
    tensorboard: str = "tensorboard",
) -> int:
    """Train or resume the run in `workdir`; returns the exit code: 0 finished, 75 stopped with everything saved.

    With `accept_changes` it goes on with another recipe, and from an earlier checkpoint, `from_step`. Trackers compare
    the runs of an `experiment`; `tensorboard` is how the user starts that program.
    """
    if group.is_writer:
        check_trackers(config.track)
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
            if from_step is not None:
                leave_later(workdir, run.start)
        group.check_shared(workdir / "lock")
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir / "checkpoints")))
        stack.push(group.end_if_several)  # or an error would wait for the other processes in the line above
        if checkpoints.steps != run.saved_steps:
            raise TransientError(f"another process has just trained in {workdir}: run the same command again.")
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
        introduce(run, group, tensorboard)
        tracker = make_tracker(run, run.start, experiment, group, lambda: checkpoints.newest or run.start or None)
        stack.enter_context(contextlib.closing(tracker))
        describe_start(run, tracker, group)

        reporter = Reporter(run, tracker)
        saver = Saver(run, checkpoints, watchdog, group)
        evaluator = Evaluator(run, tracker, checkpoints, stop, watchdog, group.is_writer)
        tracer = stack.enter_context(contextlib.closing(make_tracer(run, group)))
        batches = stack.enter_context(contextlib.closing(run.batches(watchdog.waits_for)))
        step = fit(run, state, batches, reporter, saver, evaluator, tracer, stop)
        saver.finish()
        reporter.check(step)

        ended = step == run.plan.total_steps or run.has_converged
        with damage_set_aside(workdir):
            results = evaluator.finish(step) if ended and not evaluator.is_behind(step) else None
        if results is None:
            when = f", {time.monotonic() - stop.since:.1f} s after the signal" if stop.requested else ""
            log.info("stopped at step %d of %d, all saved in %s%s: run the same command again to resume",
                step, run.plan.total_steps, workdir / "checkpoints" / str(step), when)  # fmt: skip
            return EXIT_STOPPED
        if group.is_writer:
            conclude(run, tracker, results)
    log.info("finished: %s", in_words(results, run.plan.total_steps))
    return FINISHED


def leave_later(workdir: Path, step: int) -> None:
    """Move the checkpoints after this step to WORKDIR/left, where no run reads them."""
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        if folder.name.isdecimal() and int(folder.name) > step:
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
    accuracy = f"accuracy {percent(test['accuracy'])} (95 % interval {percent(low)} to {percent(high)})"
    accuracy += f" on {test['examples']:,} test photographs"
    if not selected["metric"]:
        return f"{accuracy} at step {step}, {selected['why']}"
    value = f"{selected['value']:.4f}" if selected["metric"].endswith("loss") else percent(selected["value"])
    text = f"{accuracy} at step {step}, selected by {selected['metric']} {value}"
    if last["step"] != step:
        text += f"; at step {last['step']}, the last, {percent(last['test']['accuracy'])}"
    return text + (f"; not better since, so {planned - last['step']} steps were left out" * (last["step"] < planned))
