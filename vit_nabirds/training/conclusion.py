"""What a finished training shows its trackers: final figures, and what the selected checkpoint gets wrong."""

import contextlib
import logging

import numpy as np
import polars as pl

from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.answers import by_class, scored
from vit_nabirds.files import write_json
from vit_nabirds.runs import pictures
from vit_nabirds.runs.quantities import percent
from vit_nabirds.runs.selection import PREDICTIONS
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training.introduction import SHOWN, credit
from vit_nabirds.training.run import Run

log = logging.getLogger("vit_nabirds")

SPECIES = 8  # in a picture


def conclude(run: Run, tracker: Tracker, results: dict) -> None:
    """Write results.json, and show the trackers what it says, unless that has been done by an earlier call."""
    file = run.workdir / "results.json"
    is_new = not file.exists()
    write_json(file, results)  # first: nothing that fails below is lost
    if not is_new:
        return
    step, selected = results["last"]["step"], results["selected"]
    finals = {name: value for name, value in results["test"].items() if isinstance(value, float)}
    if selected["metric"]:
        finals[selected["metric"].replace("/", "_")] = selected["value"]
    tracker.finals(step, finals)
    answers = answers_of(run)
    if answers.is_empty():
        return
    wrong = answers.filter(~pl.col("right")).sort("probability", descending=True)
    for name, first in (("test/mistakes", 0), ("test/mistakes_more", SHOWN)):
        if (picture := draw_mistakes(run, wrong[first : first + SHOWN])) is not None:
            tracker.images(name, step, picture)
    if not wrong.is_empty():
        tracker.images("test/confused", step, draw_confused(answers))
    tracker.images("test/species", step, draw_species(answers))
    right = answers["right"].to_numpy()
    tracker.images("test/confidence", step, pictures.draw_confidence(answers["probability"].to_numpy(), right))


def answers_of(run: Run) -> pl.DataFrame:
    """`scored`, with the index of each photograph in the split, and its photographer."""
    table = run.table.filter(split="test").select("path", "photographer").with_row_index("index")
    return scored(pl.read_parquet(run.workdir / PREDICTIONS)).join(table, on="path", maintain_order="left")


def draw_mistakes(run: Run, wrong: pl.DataFrame) -> np.ndarray | None:
    """Photographs with species, wrong answer and photographer; None if there are none that can be read."""
    images, captions, split = [], [], run.test_split
    for row in wrong.iter_rows(named=True):
        image = np.empty((split.size, split.size, 3), np.uint8)
        with contextlib.suppress(UserError):
            split.read(row["index"], image)
            images.append(image / np.float32(255))
            answer = f"{percent(row['probability'], 0)} {row['predicted']}"
            captions.append((row["label"], answer, credit(row["photographer"])))
    return pictures.draw_row(np.stack(images), captions) if images else None


def draw_confused(answers: pl.DataFrame) -> np.ndarray:
    """Photographs by truth and answer, of the species in most mistakes."""
    wrong = answers.filter(~pl.col("right"))
    names = pl.concat([wrong["label"], wrong["predicted"]]).value_counts(sort=True)["label"][:SPECIES].to_list()
    counts = np.zeros((len(names), len(names)), int)
    for truth, answer in answers.select("label", "predicted").iter_rows():
        if truth in names and answer in names:
            counts[names.index(truth), names.index(answer)] += 1
    return pictures.draw_confusion(names, counts)


def draw_species(answers: pl.DataFrame) -> np.ndarray:
    """The accuracy of the species with the lowest."""
    species = by_class(answers).sort("accuracy", "label")
    shown, perfect = species.head(SPECIES), (species["correct"] == species["examples"]).sum()
    title = f"The {len(shown)} worst of {len(species):,} species; {perfect:,} are always right"
    return pictures.draw_accuracies(
        shown["label"].to_list(), shown["correct"].to_numpy(), shown["examples"].to_numpy(), title
    )
