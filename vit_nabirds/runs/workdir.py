"""What a run has left in its workdir, read without a checkpoint and without JAX's devices: for reports."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl

from vit_nabirds.config import Config
from vit_nabirds.config.fields import with_defaults
from vit_nabirds.config.json_files import read_object
from vit_nabirds.data.foreign import PARQUET_ERRORS, read_parquet
from vit_nabirds.errors import UserError, quoted
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.record import Record, read_record
from vit_nabirds.runs.selection import PREDICTIONS, TEST, check_figures

ANSWERS = {
    "path": pl.String,
    "label": pl.String,
    "predictions": pl.List(pl.String),
    "probabilities": pl.List(pl.Float32),
}


@dataclasses.dataclass(frozen=True)
class Workdir:
    folder: Path
    config: Config
    metrics: list[dict]  # lines of metrics.jsonl
    results: dict | None  # None before the end of the training
    answers: pl.DataFrame | None  # predictions.parquet, of the same moment
    record: Record | None  # None for a run of an earlier version

    @property
    def test(self) -> dict:
        """The final figures; empty before the end."""
        return self.results["test"] if self.results else {}

    @property
    def split(self) -> str:
        """That evaluations during the training look at, as metrics are named."""
        return "val" if self.config.data.validation else "test"

    @property
    def evaluations(self) -> dict[int, dict]:
        """The figures of those during the training, by step."""
        prefix = f"{self.split}/"
        named = {
            line["step"]: {name.removeprefix(prefix): line[name] for name in line if name.startswith(prefix)}
            for line in self.metrics
            if f"{prefix}accuracy" in line
        }
        return {step: figures for step, figures in named.items() if _are_shares(figures)}

    def series(self, name: str) -> list[tuple[float, float]]:
        """(epoch, value) of a metric like "train/loss"."""
        points = [(line.get("epoch", line["step"]), line[name]) for line in self.metrics if name in line]
        return [point for point in points if not any(isinstance(x, list) for x in point)]


def read_workdir(folder: Path) -> Workdir:
    """Of a run that has finished, stopped, or trains right now. UserError if there is none, or a file is damaged."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run (no 'config.json'): give the --workdir of a training.")
    try:
        config = Config.read(with_defaults(read_object(folder / "config.json")))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({quoted(error)}).") from None
    results = _results(folder / "results.json")
    answers = _answers(folder / PREDICTIONS) if results else None
    return Workdir(folder, config, read_metrics(folder / "metrics.jsonl"), results, answers, read_record(folder))


def _results(file: Path) -> dict | None:
    if not file.is_file():
        return None
    try:
        results = read_object(file)
        for figures in (results["test"], results["last"]["test"]):
            check_figures(figures, TEST)
            if not _are_shares(figures):
                raise ValueError("an accuracy is not between 0 and 1")
        steps = results["selected"]["step"], results["last"]["step"]
        if not all(type(step) is int for step in steps) or not isinstance(results["selected"]["metric"], str | None):
            raise ValueError("it does not say which steps were scored")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({quoted(error)}): run the training's command again.") from None
    return results


def _are_shares(figures: dict) -> bool:
    """Whether all figures of an evaluation are there, on at least one photograph, the accuracies in [0, 1]."""
    needed, values = TEST - {"accuracy_interval"}, {name: np.array(value) for name, value in figures.items()}
    if not figures.keys() >= needed or any(values[name].ndim for name in needed) or values["examples"] < 1:
        return False
    return all(((0 <= x) & (x <= 1)).all() for name, x in values.items() if "accuracy" in name)


def _answers(file: Path) -> pl.DataFrame | None:
    """None without the file: another copy of the workdir may have it."""
    if not file.is_file():
        return None
    try:
        table = read_parquet(file, columns=list(ANSWERS)).cast(ANSWERS)
    except PARQUET_ERRORS as error:
        raise UserError(f"{file} is not a readable Parquet file ({quoted(error)}).") from None
    return table
