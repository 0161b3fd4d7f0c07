"""Train a run for each combination of values of some fields, one after the other, and compare them."""

import itertools
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from vit_nabirds.commands.invocation import main_program
from vit_nabirds.config import Config
from vit_nabirds.config.fields import flat, short_name
from vit_nabirds.errors import ConfigError, TransientError, UserError, quoted
from vit_nabirds.parallel.locks import lock
from vit_nabirds.parallel.preemption import EXIT_STOPPED
from vit_nabirds.runs.apart import LOG, train_apart
from vit_nabirds.runs.quantities import percent
from vit_nabirds.runs.summary import FINISHED, changes, read_summary

log = logging.getLogger("vit_nabirds")

REQUIRED = ("workdir", "set")
FLAGS = {
    "workdir": (str, "Folder of the runs; each has a workdir in it, like learning_rate=1e-05,seed=0."),
    "set": ([], "FIELD=VALUE,VALUE: the values of a field to try, like seed=0,1,2; may be given several times."),
    "dry_run": (
        False,
        "List the runs with their numbers, train nothing; with a number, print the workdir of that run.",
    ),
    "index": (int, "Train the run of this number alone, from 0 on (default: SLURM_ARRAY_TASK_ID, in a job array)."),
}
PARALLEL = True
CONFIGURED = "demo.py"
LONGEST = 200  # characters of a workdir's name; file systems take 255 bytes


class Planned(NamedTuple):
    """One run of a sweep."""

    workdir: Path
    values: dict[str, Any]  # by dotted name
    config: Config


def run(options, group) -> int:
    from vit_nabirds.commands.train import experiment_of, train_or_resume

    runs = planned(options.config, Path(options.workdir), options.set)
    index = number_of(options.index, len(runs))
    if index is None:  # a task of an array may find data that were copied to its node
        check_earlier(runs)
    if options.dry_run:
        if group.is_writer:
            print("\n".join(listed(runs) if index is None else [str(runs[index].workdir)]))
        return 0
    if index is not None:
        return train_or_resume(runs[index].config, runs[index].workdir, group, experiment_of(options))
    if group.num_processes > 1:
        raise ConfigError(
            f"sweep starts its trainings itself, but there are {group.num_processes} processes of it: start it as one "
            "task, or give each job the --index of its run."
        )
    return train_all(runs, [command_of(run, options["config"]) for run in runs], Path(options.workdir))


def number_of(index: int | None, count: int) -> int | None:
    """Of the run that this process trains; None: all. ConfigError if there is no such run."""
    name, task = "--index", os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if index is None and task.isdecimal():
        name, index = "SLURM_ARRAY_TASK_ID", int(task)
    if index is not None and not 0 <= index < count:
        raise ConfigError(f"{name} is {index}, but the sweep has {count} runs: submit it with --array=0-{count - 1}.")
    return index


def planned(base: Any, folder: Path, settings: list[str]) -> list[Planned]:
    """The runs of all combinations, each on top of the configuration `base`, in the order of the flags. ConfigError for
    the first that cannot be."""
    from vit_nabirds.config.flags import value_of

    tried: dict[str, list] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            if not equals:
                raise ConfigError("write FIELD=VALUE,VALUE, like optimizer.learning_rate=1e-5,3e-5.")
            if name in tried:
                raise ConfigError(f"{name} has values already: give all of them in one --set.")
            tried[name] = [value_of(base, name, value) for value in split_values(text)]
        except ConfigError as error:
            raise ConfigError(f"--set={quoted(setting)}: {error}") from None
    fields, runs = flat(base.to_dict()), {}
    for combination in itertools.product(*tried.values()):
        values = dict(zip(tried, combination, strict=True))
        workdir = folder / name_of(values)
        if workdir in runs:
            raise ConfigError(
                f"--set gives two runs the name {workdir.name}: a value is there twice, or two look alike."
            )
        try:
            runs[workdir] = Planned(workdir, values, Config.read(fields | values))
        except ConfigError as error:
            raise ConfigError(f"{workdir.name}: {error}") from None
    return list(runs.values())


def split_values(text: str) -> list[str]:
    """'1,2' -> ['1', '2'], but at no comma in brackets or quotes; a value in quotes is what is between them."""
    values, closing, start = [], [], 0
    for at, char in enumerate(text + ","):
        if closing and char == closing[-1]:
            closing.pop()
        elif char in "([{" and (not closing or closing[-1] not in "'\""):
            closing.append(")]}"["([{".index(char)])
        elif char in "'\"" and not text[start:at].strip():
            closing.append(char)
        elif char == "," and not closing:
            values.append(text[start:at].strip())
            start = at + 1
    if closing:
        raise ConfigError(f"a bracket or a quote is open at the end: {closing[-1]} is missing.")
    if "" in values:
        raise ConfigError("a value is empty: write '' for an empty text.")
    return [re.sub(r"^(['\"])(.*)\1$", r"\2", value) for value in values]


def name_of(values: dict[str, Any]) -> str:
    """'learning_rate=1e-05,seed=0': what a shell and a file system take."""
    words = {name: "-".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    said = ",".join(f"{short_name(name)}={value}" for name, value in words.items())
    return re.sub(r"[^\w.,=+-]+", "-", said)[:LONGEST]


def listed(runs: list[Planned]) -> list[str]:
    """A line for each, with its number and state, and how to train them as jobs."""
    states = [read_summary(run.workdir).state for run in runs]
    lines = [f"{n:>4}  {state:<18} {run.workdir}" for n, (run, state) in enumerate(zip(runs, states, strict=True))]
    return [*lines, f"{len(runs)} runs: launch/train.sbatch --array=0-{len(runs) - 1} -- sweep … trains each in a job"]


def check_earlier(runs: list[Planned]) -> None:
    """UserError if a workdir holds a run with another configuration, or the sweep's folder a run itself."""
    folder = runs[0].workdir.parent
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is the workdir of a run: give the sweep a folder of its own.")
    for run in runs:
        if changed := changes(read_summary(run.workdir), run.config):
            said = "; ".join(f"{name}: {change}" for name, change in changed.items())
            raise UserError(
                f"{run.workdir} holds a run with another configuration ({quoted(said)}): use another --workdir, or "
                "delete that folder."
            )


def command_of(run: Planned, flag: Any) -> list[str]:
    """What trains the run. `flag`: --config, with what --config.x.y=VALUE has changed."""
    fields = flag.override_values | run.values
    files = [f"--config={flag.config_filename}", f"--workdir={run.workdir}"]
    return [*main_program(), "train", *files, *(f"--config.{name}={value}" for name, value in fields.items())]


def train_all(runs: list[Planned], commands: list[list[str]], folder: Path) -> int:
    """Train those that have not finished, each by its command, print the table of all, and return the exit code.

    UserError for runs that have failed; the others have been trained.
    """
    from vit_nabirds.evaluation.comparison import rows_of, show, views_of

    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    with lock(folder / "lock", f"another sweep, or a run that one has left behind, trains in {folder}: wait.") as held:
        for number, (run, command) in enumerate(zip(runs, commands, strict=True), start=1):
            if read_summary(run.workdir).state == FINISHED:
                continue
            log.info("%d of %d: %s", number, len(runs), run.workdir / LOG)
            code, said = train_apart(command, run.workdir, held.fileno())
            if code == EXIT_STOPPED:
                log.info("stopped: run the same command again to go on")
                return EXIT_STOPPED
            if code:
                failed[run.workdir.name] = code
                log.error("%s: exit code %d: %s", run.workdir, code, said)
            elif results := read_summary(run.workdir).results:
                log.info("test accuracy %s", percent(results["test"]["accuracy"]))
    show(views_of(rows_of([run.workdir for run in runs])))
    if failed:
        may_be_gone_later = any(code < 0 or code == TransientError.exit_code for code in failed.values())
        kind = TransientError if may_be_gone_later else UserError
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        raise kind(f"{len(failed)} of {len(runs)} runs failed: {names}. The same command trains them again.")
    return 0
