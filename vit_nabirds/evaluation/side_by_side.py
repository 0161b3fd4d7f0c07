"""What the page of two runs says, A and B: beside each other, and where their answers differ."""

import polars as pl

from vit_nabirds.config import Config
from vit_nabirds.evaluation import answers as of_answers
from vit_nabirds.evaluation.album import Album
from vit_nabirds.evaluation.figures import wilson
from vit_nabirds.evaluation.plots import Curve, curves
from vit_nabirds.evaluation.report import (
    ANSWER,
    CURVES,
    facts,
    field_rows,
    headline,
    levels,
    missing,
    scale_start,
    shown,
)
from vit_nabirds.runs.workdir import Workdir

DIFFERING = 18  # photographs that are shown of each kind
COLOURS = ("one", "two")
FIGURES = {
    "accuracy": "accuracy",
    "top5_accuracy": "truth among the five likeliest",
    "mean_class_accuracy": "mean over the classes",
}
OTHER_FIGURES = {"loss": "loss", "mistake_distance": "edges from a mistake to the truth", "examples": "photographs"}


def comparison_of(one: Workdir, other: Workdir, album: Album) -> dict:
    """The content of comparison.html."""
    runs = (one, other)
    tables = [None if run.answers is None else of_answers.scored(run.answers) for run in runs]
    both = of_answers.side_by_side(*tables) if all(table is not None for table in tables) else None
    figures = figures_beside(runs, album)
    content = {
        "runs": runs,
        "names": names_of(runs),
        "headlines": [headline(run) for run in runs],
        "figures": figures,
        "figures_start": scale_start([{"low": x[1]} for row in figures if row["is_share"] for x in row["values"] if x]),
        "plots": [plot for name in CURVES if (plot := both_curves(runs, name))],
        "changes": (changed := changes(one.config, other.config)),
        "only_seeds": [row["name"] for row in changed] == ["seed"],
        "facts": facts_beside(runs),
        "missing": [f"{letter}: {line}" for letter, run in zip("AB", runs, strict=True) for line in missing(run)],
        "album": album,
        "difference": None,
    }
    return content if both is None or both.is_empty() else content | on_both(both, tables, album)


def on_both(both: pl.DataFrame, tables: list[pl.DataFrame], album: Album) -> dict:
    """The part of the content that needs both runs' answers to the same photographs."""
    differing = both.filter(pl.col("right") != pl.col("right_other")).with_columns(
        sure=pl.when("right").then("probability_other").otherwise("probability")  # how sure the wrong one is
    )
    gained, lost = (differing.filter(pl.col("right_other") == better) for better in (True, False))
    classes = [
        of_answers.by_class(both.select("path", "label", *(pl.col(f"{name}{end}").alias(name) for name in ANSWER)))
        for end in ("", "_other")
    ]
    joined = (
        classes[0]
        .join(classes[1], on="label", suffix="_other")
        .with_columns(change=pl.col("accuracy_other") - pl.col("accuracy"))
    )
    return {
        "difference": of_answers.difference(both),
        "common": len(both),
        "left_out": [len(table) - len(both) for table in tables],
        "gained": photographs_of(gained, album),
        "lost": photographs_of(lost, album),
        "num_gained": len(gained),
        "num_lost": len(lost),
        "classes": joined.sort("change", "label").to_dicts(),
    }


def photographs_of(differing: pl.DataFrame, album: Album) -> list[dict]:
    """Those about which the wrong run is surest."""
    rows = differing.sort("sure", "path", descending=[True, False]).head(DIFFERING).iter_rows(named=True)
    return [shown(row, album, ("A: ", "B: ")) for row in rows]


def both_curves(runs: tuple[Workdir, Workdir], name: str) -> dict | None:
    """Of two runs, over each other: their evaluations if both have some, else their trainings."""
    evaluated = [run.series(f"{run.split}/{name}") for run in runs]
    trained = [run.series(f"train/{name}") for run in runs]
    is_dotted = all(evaluated)
    points = evaluated if is_dotted else trained
    lines = [Curve(line, colour, is_dotted) for line, colour in zip(points, COLOURS, strict=True) if line]
    if not lines:
        return None
    of = {"loss": ", training", "accuracy": ", training"}.get(name, "")
    title = f"{CURVES[name]}{', evaluations' if is_dotted else of}"
    return {"title": title, "legend": [], "svg": curves(lines, percent=name == "accuracy")}


def changes(one: Config, other: Config) -> list[dict]:
    """The fields in which two configurations differ."""
    pairs = zip(field_rows(one), field_rows(other), strict=True)
    return [a | {"other": b["value"]} for a, b in pairs if a["value"] != b["value"]]


def facts_beside(runs: tuple[Workdir, Workdir]) -> list[tuple[str, list[str | None]]]:
    rows = zip(*(facts(run) for run in runs), strict=True)
    return [(one[0], [one[1], other[1]]) for one, other in rows]


def figures_beside(runs: tuple[Workdir, Workdir], album: Album) -> list[dict]:
    """A row for each figure of the final scores: its name, and for each run (share, low, high), a number, or None."""
    above = sorted({row["name"] for run in runs for row in levels(run.test, album)[:-1]})
    names = FIGURES | {name: f"accuracy at level {name[14:]} of the taxonomy" for name in above}
    rows = [
        {"words": words, "is_share": True, "values": [with_interval(run.test, name) for run in runs]}
        for name, words in names.items()
    ]
    rows += [
        {"words": words, "is_share": False, "values": [run.test.get(name) for run in runs]}
        for name, words in OTHER_FIGURES.items()
    ]
    return [row for row in rows if any(value is not None for value in row["values"])]


def with_interval(test: dict, name: str) -> tuple[float, float, float] | None:
    if name not in test:
        return None
    return (test[name], *(test.get(f"{name}_interval") or wilson(test[name], test["examples"])))


def names_of(runs: tuple[Workdir, Workdir]) -> list[str]:
    """Of their folders; their paths where these are the same."""
    names = [run.folder.absolute().name for run in runs]
    return names if names[0] != names[1] else [str(run.folder) for run in runs]
