"""What the page of a run says: from its workdir and its data, without a device."""

import math
import re

import polars as pl

from vit_nabirds.config import Config
from vit_nabirds.config.fields import Model, fields, flat, value_in_words
from vit_nabirds.evaluation import answers as of_answers
from vit_nabirds.evaluation.album import Album
from vit_nabirds.evaluation.figures import wilson
from vit_nabirds.evaluation.pages import moment
from vit_nabirds.evaluation.plots import Curve, curves, reliability
from vit_nabirds.runs.quantities import time_in_words
from vit_nabirds.runs.selection import metric_of
from vit_nabirds.runs.workdir import Workdir

MISTAKES, PAIRS, EXTREMES = 24, 8, 8  # that are shown
ANSWER = ("predicted", "probability", "right")
CURVES = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "learning_rate": "Learning rate",
    "images_per_second": "Photographs a second",
}


def page_of(run: Workdir, album: Album) -> dict:
    """The content of report.html."""
    answers = None if run.answers is None else of_answers.scored(run.answers)
    rows = levels(run.test, album)
    content = {
        "run": run,
        "name": run.folder.absolute().name,
        "headline": headline(run),
        "epochs": epochs_in_words(run),
        "levels": rows,
        "levels_start": scale_start(rows),
        "plots": [plot for name in CURVES if (plot := own_curves(run, name))],
        "fields": field_rows(run.config),
        "facts": facts(run),
        "commands": commands(run),
        "missing": missing(run) + [f"There are no photographs: {album.problem}"] * bool(album.problem and run.results),
        "album": album,
        "classes": None,
    }
    return content if answers is None or answers.is_empty() else content | on_answers(answers, album)


def on_answers(answers: pl.DataFrame, album: Album) -> dict:
    """The part of the content that needs the answers to the single photographs."""
    classes = of_answers.by_class(answers)
    best, worst = of_answers.extremes(classes, EXTREMES)
    bins, error = of_answers.calibration(answers)
    wrong = answers.filter(~pl.col("right")).sort("probability", "path", descending=[True, False])
    return {
        "classes": classes.to_dicts(),
        "classes_start": scale_start(classes.to_dicts()),
        "best": best.to_dicts(),
        "worst": worst.to_dicts(),
        "pairs": [pair_shown(answers, pair, album) for pair in of_answers.confused_pairs(answers, PAIRS)],
        "mistakes": [shown(row, album) for row in wrong.head(MISTAKES).iter_rows(named=True)],
        "num_mistakes": len(wrong),
        "calibration_error": error,
        "mean_probability": answers["probability"].mean(),
        "reliability": reliability(bins, of_answers.BINS),
    }


def shown(row: dict, album: Album, who: tuple[str, ...] = ("",)) -> dict:
    """A photograph, the truth, and what each run says: predicted, probability, whether that is right, which run."""
    said = [(*(row[f"{name}{end}"] for name in ANSWER), run) for run, end in zip(who, ("", "_other"), strict=False)]
    return {"photograph": album.find(row["path"], row["label"]), "label": row["label"], "said": said}


def pair_shown(answers: pl.DataFrame, pair: tuple[str, str, int, int], album: Album) -> dict:
    """Two classes side by side: one that is known well, one taken for the other, the same the other way round."""
    one, other, there, back = pair
    kinds = [(one, one), (one, other), (other, one), (other, other)]
    rows = [
        answers.filter((pl.col("label") == label) & (pl.col("predicted") == predicted))
        .sort("probability", "path", descending=[True, False])
        .head(1)
        .to_dicts()
        for label, predicted in kinds
    ]
    photographs = [shown(row, album) for found in rows for row in found]
    return {"one": one, "other": other, "there": there, "back": back, "photographs": photographs}


def headline(run: Workdir) -> dict | None:
    """The accuracy that counts, with its interval: of the test photographs, or of the best evaluation so far."""
    if run.test:
        selected = run.results["selected"]
        why = f"selected by {selected['metric']}" if selected["metric"] else "the last"
        figures, step, of = run.test, selected["step"], "test"
    else:
        evaluations, metric = run.evaluations, (metric_of(run.config) or "").partition("/")[2]
        if not evaluations:
            return None
        sign = -1 if metric == "loss" else 1
        step = max(evaluations)
        if metric:  # as the run selects
            step = max(sorted(evaluations), key=lambda n: (sign * evaluations[n][metric], -evaluations[n]["loss"]))
        figures, of = evaluations[step], "validation" if metric else "test"
        why = "the best so far" if metric else "the newest evaluation"
    examples, share = figures["examples"], figures["accuracy"]
    low, high = figures.get("accuracy_interval") or wilson(share, examples)
    return {
        "share": share, "low": low, "high": high, "correct": round(share * examples), "examples": examples, "of": of,
        "step": step, "why": why, "figures": figures,
    }  # fmt: skip


def epochs_in_words(run: Workdir) -> str:
    """Like '6 epochs', or '4.5 of 6 epochs' of a training that was stopped or has ended early."""
    planned, last = run.config.epochs, max(run.metrics, key=lambda line: line["step"], default={})
    is_whole = not last or run.record and last["step"] >= run.record.total_steps or last.get("epoch", 0) >= planned
    return f"{planned:g} epochs" if is_whole else f"{last.get('epoch', 0):.3g} of {planned:g} epochs"


def commands(run: Workdir) -> list[tuple[int, str]]:
    """(step, command) of each start that was asked for in other words than the one before."""
    starts = [start for start in (run.record.starts if run.record else ()) if start.command]
    before = ["", *(start.command for start in starts)]
    return [(x.step, x.command) for x, earlier in zip(starts, before, strict=False) if x.command != earlier]


def levels(test: dict, album: Album) -> list[dict]:
    """Accuracy at each level of the taxonomy, from below the root down to the classes."""
    names = [name for name in test if re.fullmatch("accuracy_level[0-9]{1,3}", name)]
    rows = []
    for number, name in enumerate([*sorted(names, key=lambda name: int(name[14:])), "accuracy"] if names else [], 1):
        groups = None
        if album.taxonomy and number <= album.taxonomy.levels:
            groups = len(set(album.taxonomy.ancestors[:, number - 1].tolist()))
        low, high = test.get(f"{name}_interval") or wilson(test[name], test["examples"])
        label = "class" if name == "accuracy" else f"level {name[14:]}"
        rows.append({"name": name, "label": label, "groups": groups, "share": test[name], "low": low, "high": high})
    return rows


def scale_start(rows: list[dict]) -> float:
    """Where a scale begins on which the intervals of all rows lie, in tenths."""
    lowest = min((row["low"] for row in rows), default=0.0)
    return min(max(math.floor(10 * lowest + 1e-9) / 10, 0.0), 0.9)


def own_curves(run: Workdir, name: str) -> dict | None:
    """The training's curve, and over it that of the evaluations."""
    lines = {
        "training": Curve(run.series(f"train/{name}")),
        {"val": "validation"}.get(run.split, "test"): Curve(run.series(f"{run.split}/{name}"), "two", True),
    }
    lines = {label: line for label, line in lines.items() if line.points}
    if not lines:
        return None
    legend = [(label, line.colour) for label, line in lines.items()] if len(lines) > 1 else []
    return {"title": CURVES[name], "legend": legend, "svg": curves(list(lines.values()), percent=name == "accuracy")}


def field_rows(config: Config) -> list[dict]:
    """Every field: name, value, default, meaning, and whether the value differs from the default. A default of None
    stands for what the checkpoint has."""
    values, rows = flat(config.to_dict()), []
    for name, field in fields():
        value, default = values[name], field.metadata["default"]
        differs = value != default and not (default is None and config.model.pretrained)
        row = {"name": name, "value": worded(value), "default": worded(default), "differs": differs}
        rows.append(row | {"meaning": field.metadata["meaning"]})
    return rows


def worded(value: object) -> str:
    """A default that depends on something else, and no text, as a dash."""
    return "–" if value in (None, "") else value_in_words(value)


def facts(run: Workdir) -> list[tuple[str, str | None]]:
    """(what, text) about data, model, hardware and program; None for what is not recorded."""
    record, config = run.record, run.config
    start = record.starts[-1] if record else None
    times = [line["time"] for line in run.metrics if "time" in line]
    return [
        ("data", config.data.root),
        ("photographs", record and ", ".join(f"{count:,} {split}" for split, count in record.photographs.items())),
        ("classes", record and f"{record.classes:,}, by {config.data.label}"),
        ("fingerprint of the data", record and record.fingerprint),
        ("weights at the start", config.model.pretrained or "random"),
        ("model", model_in_words(config.model)),
        ("parameters", record and f"{record.parameters:,}, of which {record.trained:,} are trained"),
        ("first start", record and moment(record.starts[0].time)),
        ("starts", record and f"{len(record.starts):,}{'; below is the last' * (len(record.starts) > 1)}"),
        ("logged for", time_in_words(max(times) - min(times)) if times else None),
        ("devices", start and f"{start.devices}; {start.processes:,} process{'es' * (start.processes > 1)}"),
        ("git revision", start and (start.revision or None)),
        ("versions", start and ", ".join(f"{name} {version}" for name, version in start.versions.items())),
    ]


def model_in_words(model: Model) -> str:
    return (
        f"{model.num_layers} blocks of width {model.hidden_size} with {model.num_heads} heads, patches of "
        f"{model.patch_size} px, images of {model.image_size} px, head on {model.pool}"
    )


def missing(run: Workdir) -> list[str]:
    """What the page cannot say, and why."""
    lines = []
    if run.results is None:
        last, total = max((line["step"] for line in run.metrics), default=0), run.record and run.record.total_steps
        reached = f"step {last:,}" + (f" of {total:,}" if total else "")
        known = "nothing is known about the test photographs"
        if run.split == "test" and run.evaluations:
            known = "the figures are those of its newest evaluation"
        lines.append(
            f"The training has not come to its end (the log has {reached}), so {known}. The command of the training, "
            "run again, goes on with it."
        )
    elif run.answers is None:
        lines.append("predictions.parquet is missing, so nothing is said of single species and photographs.")
    if not run.metrics:
        lines.append("metrics.jsonl has no line, so there are no curves.")
    if run.record is None:
        lines.append("The run has no run.json: hardware, versions and the command were not recorded.")
    return lines
