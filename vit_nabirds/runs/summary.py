"""What a workdir says about its run, finished or not: its small files alone, no checkpoint and no JAX."""

import dataclasses
import functools
import math
import operator
import os
import re
import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vit_nabirds.config import Config
from vit_nabirds.config.fields import FREE_ON_RESUME, fields, flat, with_defaults
from vit_nabirds.config.json_files import read_object
from vit_nabirds.errors import UserError, reason_of
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.record import Record, read_record
from vit_nabirds.runs.selection import TEST, check_figures

PLACES = ("data.root", "model.pretrained")  # of data and weights; elsewhere they may be others
# Fields that change nothing in a finished run.
HARMLESS = re.compile(rf"(?!{'|'.join(map(re.escape, PLACES))})({FREE_ON_RESUME.pattern})").fullmatch
FINISHED, NOT_STARTED, DAMAGED = "finished", "not started", "damaged"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run, as far as its files can be read."""

    workdir: Path
    config: Config | None = None  # None: there is none yet, or it is damaged
    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)  # lines of metrics.jsonl, without lists
    results: dict | None = None  # results.json of a finished training
    record: Record | None = None  # run.json; None for a run of an earlier version
    problem: str = ""  # which file cannot be used, and why

    @property
    def state(self) -> str:
        """FINISHED, NOT_STARTED, DAMAGED, or like 'step 20 of 60'."""
        if self.problem:
            return DAMAGED
        if self.results:
            return FINISHED
        if not self.last_step:
            return NOT_STARTED
        return f"step {self.last_step}" + (f" of {self.total_steps}" if self.total_steps else "")

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The configuration by dotted name, as it is written; empty without one."""
        return flat(self.config.to_dict()) if self.config else {}

    @property
    def photographs(self) -> str:
        """What tells the data of runs apart, wherever they lie."""
        return self.record.fingerprint if self.record else self.fields.get("data.root", "")

    @functools.cached_property
    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    @functools.cached_property
    def total_steps(self) -> int | None:
        """Of the whole training as it is planned. The log has no number of photographs, but steps and epochs."""
        if self.record:
            return self.record.total_steps
        line = max(self.metrics, key=lambda line: line.get("epoch", 0), default={})
        if self.config is None or line.get("epoch", 0) <= 0:
            return None
        try:
            photographs = round(line["step"] * self.config.batch_size / line["epoch"])
            return math.ceil(Fraction(str(self.config.epochs)) * photographs / self.config.batch_size)
        except OverflowError:
            return None

    @functools.cached_property
    def evaluations(self) -> list[dict[str, float]]:
        """The lines that score validation photographs, by step."""
        return sorted((line for line in self.metrics if "val/accuracy" in line), key=lambda line: line["step"])

    @property
    def evaluation(self) -> dict[str, float]:
        """Of the selected checkpoint; of an unfinished run the latest. Empty if there is none."""
        selected = self.results and self.results["selected"]["step"]
        return next((line for line in reversed(self.evaluations) if line["step"] == (selected or line["step"])), {})

    @functools.cached_property
    def seconds(self) -> float | None:
        """Spent in training steps: without starts, evaluations and pauses."""
        total, before, speed = 0.0, 0, None
        for line in self.metrics:
            speed = line.get("train/images_per_second") or speed
            if speed and self.config and line["step"] > before:
                total += (line["step"] - before) * self.config.batch_size / speed
            before = max(before, line["step"])
        return total or None

    @functools.cached_property
    def images_per_second(self) -> float | None:
        """The median of those in the log."""
        speeds = [line["train/images_per_second"] for line in self.metrics if "train/images_per_second" in line]
        return statistics.median(speeds) if speeds else None


def read_summary(workdir: Path) -> Summary:
    """Of a workdir, or of a folder in which no training has begun. What is damaged is said in `problem`."""
    found = {}
    try:
        if (file := workdir / "config.json").exists():
            found["config"] = Config.read(with_defaults(read_object(file)))
        file = workdir / "metrics.jsonl"
        found["metrics"] = [_without_lists(line) for line in read_metrics(file)]
        if (file := workdir / "results.json").exists():
            found["results"] = _checked(read_object(file))
        if "config" not in found and (found["metrics"] or "results" in found):
            found["problem"] = "config.json is missing"
    except (ValueError, UserError, OSError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        found["problem"] = f"{file.name} cannot be used ({reason})"
    return Summary(workdir, **found, record=read_record(workdir))


def _without_lists(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if not isinstance(value, list)}


def _checked(results: dict) -> dict:
    """results.json, if it is what a finished training writes; ValueError if not."""
    try:
        for figures in (results["test"], results["last"]["test"]):
            check_figures(figures, TEST)
            if not are_shares(figures):
                raise ValueError("an accuracy of it is not between 0 and 1")
        steps = results["selected"]["step"], results["last"]["step"]
        if not all(type(step) is int for step in steps) or not isinstance(results["selected"]["metric"], str | None):
            raise ValueError("it does not say which steps were scored")
    except (KeyError, TypeError):
        raise ValueError("it lacks figures") from None
    return results


def are_shares(figures: dict) -> bool:
    """Whether all figures of an evaluation are there, on at least one photograph, the accuracies in [0, 1]."""
    needed, values = TEST - {"accuracy_interval"}, {name: np.array(value) for name, value in figures.items()}
    if not figures.keys() >= needed or any(values[name].ndim for name in needed) or values["examples"] < 1:
        return False
    return all(((0 <= x) & (x <= 1)).all() for name, x in values.items() if "accuracy" in name)


def find_runs(folder: Path) -> list[Path]:
    """The workdirs in a folder and below, the folder's own too, in the order of the numbers in their names."""
    found = []
    for parent, folders, files in os.walk(folder):
        if "config.json" in files and ("checkpoints" in folders or {"metrics.jsonl", "results.json"} & set(files)):
            found.append(Path(parent))
            folders.clear()
    return sorted(found, key=_natural)


def _natural(path: Path) -> list:
    """So that run2 comes before run10, and rate=1e-05 before rate=0.0001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", str(path))
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def changes(run: Summary, config: Config) -> dict[str, str]:
    """'old -> new' by field, of each that a configuration changes in what a run learns from, on and with. What the run
    itself has filled in, where the configuration says nothing, is no change."""
    changed = {}
    for name in (name for name, _ in fields() if run.config and not HARMLESS(name)):
        before, after = (operator.attrgetter(name)(config) for config in (run.config, config))
        is_same = before == after or name in PLACES and before == os.path.realpath(os.path.expanduser(after))
        if after is not None and not is_same:
            changed[name] = f"{before} -> {after}"
    return changed
