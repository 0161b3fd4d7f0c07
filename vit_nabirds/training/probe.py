"""A linear probe: the features of a frozen model are computed once, and classifiers are trained on them."""

import contextlib
import dataclasses
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from vit_nabirds.config import Config
from vit_nabirds.config.fields import flat
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.files import write_json
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.locks import lock
from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest
from vit_nabirds.parallel.watchdog import Watchdog
from vit_nabirds.runs.checkpoints import Checkpoints, existing
from vit_nabirds.runs.compiled import keep_compiled
from vit_nabirds.runs.quantities import quantity_of
from vit_nabirds.runs.record import record_start
from vit_nabirds.runs.trackers import check as check_trackers
from vit_nabirds.training.conclusion import conclude
from vit_nabirds.training.evaluator import Evaluator
from vit_nabirds.training.features import features_of
from vit_nabirds.training.introduction import make_tracker
from vit_nabirds.training.run import Run, prepare_run
from vit_nabirds.training.saver import Saver
from vit_nabirds.training.state import TrainState
from vit_nabirds.training.sweep import Candidate, sweep
from vit_nabirds.training.train import FINISHED, in_words, prepare_synthetic

log = logging.getLogger("vit_nabirds")

SWEEP = "sweep.json"  # of the workdir: what was tried, and what was found
# Fields that a probe does not use; of those that augment by default its run says that they did not.
UNUSED = re.compile(
    r"augment\..*|data\.repeats|ema_decay|microbatch|model\.dropout_rate|model\.drop_path|.*layer_decay"
)
UNCHANGED = {"augment.flip": False, "augment.contrast": (1.0, 1.0), "augment.gamma": (1.0, 1.0)}
RATES = ("learning_rate", "weight_decay")  # fields of the optimizer


def probe(
    config: Config,
    workdir: Path,
    group: ProcessGroup,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    experiment: str = "probe",
) -> int:
    """Make `workdir` a complete run whose classifier is the best of a sweep; returns the exit code, as `train` does.

    Each classifier is trained as the configuration says, but on features without augmentation or dropout. The one with
    the best figure on the validation photographs is scored on the test photographs, once.
    """
    check_unused(config)
    check_trackers(config.track)
    config = config.replace(UNCHANGED)
    tried = {"learning_rates": list(learning_rates), "weight_decays": list(weight_decays)}
    check_sweep(config, tried, group)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        devices.split_cpu(config.cpu_devices)  # before Orbax asks for devices
        watchdog = stack.enter_context(Watchdog(config.watchdog_timeout.seconds, group, lambda: stop.requested))
        config = _as_found(config, workdir, tried)
        if config.data.synthetic:
            prepare_synthetic(Path(config.data.root), config.model.image_size)
        run = prepare_run(config, workdir, group)
        check_frozen(run)
        log.info("%s: %s", workdir, run.data_in_words)
        loaded = run.pretrained_params()

        workdir.mkdir(parents=True, exist_ok=True)
        busy = f"another process trains in {workdir} right now: wait for its end, or use another --workdir."
        stack.enter_context(lock(workdir / "lock", busy))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir / "checkpoints")))
        if checkpoints.steps != run.saved_steps:
            raise UserError(f"another process has just trained in {workdir}: run the same command again.")
        keep_compiled(workdir / "compiled", True)
        if not run.saved_steps and (run := search(run, loaded, tried, checkpoints, stop, watchdog, experiment)) is None:
            return _stopped()
        tracker = stack.enter_context(contextlib.closing(make_tracker(run, run.plan.total_steps, experiment, group)))
        results = Evaluator(run, tracker, checkpoints, stop, watchdog, True).finish(run.plan.total_steps)
        if results is None:
            return _stopped()
        conclude(run, tracker, results | {"sweep": _read_sweep(workdir)["found"]})
    log.info("finished: %s", in_words(results, run.plan.total_steps))
    return FINISHED


def search(
    run: Run,
    loaded: dict,
    tried: dict,
    checkpoints: Checkpoints,
    stop: StopRequest,
    watchdog: Watchdog,
    experiment: str,
) -> Run | None:
    """Train and compare all classifiers, and save the best with its model as the run's last step.

    Returns the run as if it had been configured with what was found; None after a request to stop.
    """
    state, features = run.first_state(loaded), {}
    for split in ["train", *(["validation"] if run.validation_split else [])]:
        if (found := features_of(run, state.params, split, run.workdir / "features", stop)) is None:
            return None
        features[split] = found
    log.info("training %d classifier(s) for %d steps", math.prod(map(len, tried.values())), run.plan.total_steps)
    head = {path: np.asarray(x) for path, x in state.params.items() if path.startswith("classifier/")}
    if (found := sweep(run, head, features, **tried, stop=stop)) is None:
        return None
    best = select(found, run.selection.metric)
    for line in table_of(found, best, run.selection.metric):
        log.info("%s", line)
    run = configured(run, best)
    _record(run, best, found, tried, experiment)
    saver = Saver(run, checkpoints, watchdog, ProcessGroup())
    saver.save(run.plan.total_steps, with_candidate(state, best, run.plan.total_steps))
    saver.finish()
    return run


def check_sweep(config: Config, tried: dict[str, list[float]], group: ProcessGroup) -> None:
    """ConfigError for what a probe cannot do."""
    if group.num_processes > 1:
        raise ConfigError(
            f"probe runs in one process, on all devices of its node, but there are {group.num_processes}: start it "
            "with one task."
        )
    if not config.data.validation and max(map(len, tried.values())) > 1:
        raise ConfigError(
            "config.data.validation is 0, so nothing says which classifier is the best: give one --learning_rates and "
            "one --weight_decays, or hold photographs out."
        )


def check_unused(config: Config) -> None:
    """ConfigError for a field that is set, but says nothing about a training on fixed features."""
    given, usual = flat(config.to_dict()), flat(Config.read({"data.root": "data"}).to_dict())
    for name, value in given.items():
        if UNUSED.fullmatch(name) and value != usual[name]:
            raise ConfigError(f"config.{name} is set, but a probe trains on fixed features: leave it out.")


def check_frozen(run: Run) -> None:
    """ConfigError if the configuration trains more than the classifier."""
    if others := [path for path in run.trainable if not path.startswith("classifier/")]:
        raise ConfigError(
            f"probe trains the classifier alone, but the configuration trains {len(others)} other arrays, like "
            f"{others[0]}: set config.trainable=classifier and config.lora.rank=0 (configs/linear_probe.py does)."
        )


def select(found: Sequence[Candidate], metric: str | None) -> Candidate:
    """The best by a figure on the validation photographs; of equal ones the smallest loss counts, then the first.

    UserError if all of them have diverged.
    """
    finite = [c for c in found if np.isfinite([*c.figures.values(), *list(c.train.values())[-1].values()]).all()]
    if not finite:
        raise UserError("the loss of every classifier is not finite: give smaller --learning_rates.")
    if metric is None:
        return finite[0]
    sign = -1 if metric.endswith("loss") else 1
    return max(finite, key=lambda c: (sign * c.figures[metric], -c.figures["val/loss"]))


def configured(run: Run, best: Candidate) -> Run:
    """The run as if its configuration had the learning rate and the weight decay that were found."""
    config = run.config.replace({f"optimizer.{name}": getattr(best, name) for name in RATES})
    return dataclasses.replace(run, config=config, metadata=dataclasses.replace(run.metadata, config=config.to_dict()))


def with_candidate(state: TrainState, best: Candidate, step: int) -> TrainState:
    """The state at the end of the training of a classifier, each array where it was."""
    trained = dataclasses.replace(
        state, step=np.int32(step), params=state.params | best.head, opt_state=best.opt_state
    )  # fmt: skip
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained, state)


def table_of(found: Sequence[Candidate], best: Candidate, metric: str | None) -> list[str]:
    """For the log: a line for each learning rate, a column for each weight decay."""
    rates, decays = ({getattr(c, name): None for c in found} for name in RATES)
    cells = {(c.learning_rate, c.weight_decay): _cell(c, c is best, metric) for c in found}
    lines = [f"{metric or 'train/loss'} by learning rate (down) and weight decay (across), * selected"]
    lines.append(" " * 10 + "".join(f"{decay:>11g}" for decay in decays))
    lines += [f"{rate:>10g}" + "".join(f"{cells[rate, decay]:>11}" for decay in decays) for rate in rates]
    if len(rates) > 2 and best.learning_rate in (min(rates), max(rates)):
        end = "the best learning rate is at the end of those tried: try others beyond it"
        lines.append(f"{end} (--learning_rates=…), in another --workdir")
    return lines


def _cell(candidate: Candidate, is_best: bool, metric: str | None) -> str:
    value = candidate.figures[metric] if metric else list(candidate.train.values())[-1]["train/loss"]
    return f"{'*' * is_best}{quantity_of(metric or 'train/loss').shown(value)}"


def _as_json(candidate: Candidate) -> dict[str, float]:
    values = {name: getattr(candidate, name) for name in RATES}
    values |= list(candidate.train.values())[-1] | candidate.figures
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _record(run: Run, best: Candidate, found: Sequence[Candidate], tried: dict, experiment: str) -> None:
    """All that the workdir says beside the checkpoint, before it is there."""
    last = run.plan.total_steps
    write_json(run.workdir / SWEEP, {"tried": tried, "found": [_as_json(candidate) for candidate in found]})
    write_json(run.workdir / "config.json", run.metadata.config)
    record_start(run.workdir, 0, run.mesh.devices.flatten().tolist(), 1, run.facts)
    if best.figures:
        run.selection.evaluations[last] = best.figures
    run.selection.write()
    with contextlib.closing(make_tracker(run, 0, experiment, ProcessGroup())) as tracker:
        for step, values in best.train.items():
            tracker.scalars(step, values)
        if best.figures:
            tracker.scalars(last, best.figures)


def _as_found(config: Config, workdir: Path, tried: dict[str, list[float]]) -> Config:
    """The configuration, with what an earlier call has found in this workdir; UserError if it holds something else."""
    saved = existing(workdir / "checkpoints")[1]
    if saved is None:
        return config
    if (earlier := _read_sweep(workdir)["tried"]) != tried:
        words = "; ".join(f"{name} {', '.join(f'{x:g}' for x in values)}" for name, values in earlier.items())
        raise UserError(
            f"{workdir} holds a probe that tried other rates ({words}): use another --workdir. Copy the folder "
            "features into it, and they need not be computed again."
        )
    return config.replace({f"optimizer.{name}": saved.config["optimizer"][name] for name in RATES})


def _read_sweep(workdir: Path) -> dict:
    try:
        return json.loads((workdir / SWEEP).read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} holds a run of `train`, not of `probe`: use another --workdir.") from None
    except ValueError as error:
        raise UserError(f"{workdir / SWEEP} is damaged ({error}): use another --workdir.") from None


def _stopped() -> int:
    log.info("stopped: run the same command again to go on")
    return EXIT_STOPPED
