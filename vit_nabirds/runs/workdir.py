"""What a run has left in its workdir, read without a checkpoint and without JAX's devices: for reports."""

import dataclasses
from pathlib import Path

import polars as pl

from vit_nabirds.config import Config
from vit_nabirds.data.foreign import PARQUET_ERRORS, read_parquet
from vit_nabirds.errors import UserError, quoted
from vit_nabirds.runs.record import Record
from vit_nabirds.runs.selection import PREDICTIONS
from vit_nabirds.runs.summary import are_shares, find_runs, read_summary

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
    metrics: list[dict[str, float]]  # lines of metrics.jsonl, without lists
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
        return {step: figures for step, figures in named.items() if are_shares(figures)}

    def series(self, name: str) -> list[tuple[float, float]]:
        """(epoch, value) of a metric like "train/loss"."""
        return [(line.get("epoch", line["step"]), line[name]) for line in self.metrics if name in line]


def read_workdir(folder: Path) -> Workdir:
    """Of a run that has finished, stopped, or trains right now. UserError if there is none, or a file is damaged."""
    if not (folder / "config.json").is_file():
        below = find_runs(folder)
        meant = f"one of the {len(below)} below it, like {below[0]}" if below else "the --workdir of a training"
        raise UserError(f"{folder} holds no run (no 'config.json'): give {meant}.")
    run = read_summary(folder)
    if run.problem:
        raise UserError(f"{folder}: {quoted(run.problem, 500)}. Run the training's command again.")
    answers = _answers(folder / PREDICTIONS) if run.results else None
    return Workdir(folder, run.config, run.metrics, run.results, answers, run.record)


def _answers(file: Path) -> pl.DataFrame | None:
    """None without the file: another copy of the workdir may have it."""
    if not file.is_file():
        return None
    try:
        table = read_parquet(file, columns=list(ANSWERS)).cast(ANSWERS)
    except PARQUET_ERRORS as error:
        raise UserError(
            f"{file} is not a readable Parquet file ({quoted(error)}): delete it, and the page says nothing of single "
            "species and photographs."
        ) from None
    return table
