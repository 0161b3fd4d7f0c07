"""What the answers to the test photographs say beyond their mean: by species, by pairs, and how far to trust them.

`scored` makes the tables that the other functions take: a row for each photograph with path, label, predicted,
probability (of the prediction) and right.
"""

import numpy as np
import polars as pl

from vit_nabirds.evaluation.figures import Z, wilson

BINS = 15  # of the probability, as Guo et al. (2017) have it


def scored(predictions: pl.DataFrame) -> pl.DataFrame:
    """Of predictions.parquet, without the photographs that could not be read."""
    table = predictions.select(
        "path",
        "label",
        predicted=pl.col("predictions").list.first(),
        probability=pl.col("probabilities").list.first().clip(0, 1).fill_nan(0),
    )
    return table.drop_nulls().with_columns(right=pl.col("label") == pl.col("predicted"))


def by_class(answers: pl.DataFrame) -> pl.DataFrame:
    """A row for each class, by name: label, examples, correct, accuracy, low and high (its 95 % interval), answered
    (how often the class was the answer), precision (null if it never was), mistaken_for (the most frequent wrong
    answer; null if all are right) and mistakes (how often that)."""
    classes = answers.group_by("label").agg(examples=pl.len(), correct=pl.col("right").sum())
    named = answers.group_by(label="predicted").agg(answered=pl.len(), precision=pl.col("right").mean())
    wrong = confusions(answers).group_by("label", maintain_order=True).first().rename({"predicted": "mistaken_for"})
    table = classes.join(named, on="label", how="left").join(wrong, on="label", how="left").sort("label")
    table = table.with_columns(pl.col("answered").fill_null(0), accuracy=pl.col("correct") / pl.col("examples"))
    ends = [wilson(*row) for row in table.select("accuracy", "examples").iter_rows()]
    low, high = zip(*ends, strict=True) if ends else ((), ())
    return table.with_columns(low=pl.Series(low, dtype=pl.Float64), high=pl.Series(high, dtype=pl.Float64))


def extremes(classes: pl.DataFrame, most: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The best and the worst of a table from `by_class`, none of them in both.

    By the ends of their intervals, so that a class with two photographs is neither the best nor the worst by luck.
    """
    count = min(most, len(classes) // 2)
    best = classes.sort("low", "examples", "label", descending=[True, True, False]).head(count)
    worst = classes.join(best, on="label", how="anti").filter(pl.col("accuracy") < 1)
    return best, worst.sort("high", "examples", "label", descending=[False, True, False]).head(count)


def confusions(answers: pl.DataFrame) -> pl.DataFrame:
    """label, predicted and how many `mistakes` of that kind there are, most first."""
    counts = answers.filter(~pl.col("right")).group_by("label", "predicted").agg(mistakes=pl.len())
    return counts.sort("mistakes", "label", "predicted", descending=[True, False, False])


def confused_pairs(answers: pl.DataFrame, most: int) -> list[tuple[str, str, int, int]]:
    """(one, other, how often one was taken for the other, and the other for the one), most mistakes first."""
    counts = {(label, predicted): count for label, predicted, count in confusions(answers).iter_rows()}
    pairs = {tuple(sorted(pair)): None for pair in counts}  # in the order of the more frequent mistake
    found = [(*pair, counts.get(pair, 0), counts.get(pair[::-1], 0)) for pair in pairs]
    return sorted(found, key=lambda row: -row[2] - row[3])[:most]


def calibration(answers: pl.DataFrame) -> tuple[pl.DataFrame, float]:
    """Whether probabilities mean what they say: for each bin of them that has photographs, how many these are, their
    mean probability and their accuracy; and the expected calibration error, the mean gap between the two."""
    number = (pl.col("probability") * BINS).floor().clip(0, BINS - 1).cast(pl.Int32)
    bins = answers.group_by(bin=number).agg(
        examples=pl.len(), probability=pl.col("probability").mean(), accuracy=pl.col("right").mean()
    )
    gap = (bins["examples"] * (bins["probability"] - bins["accuracy"]).abs()).sum() / max(len(answers), 1)
    return bins.sort("bin"), float(gap)


def side_by_side(one: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """The photographs that both runs were asked about, with the same label: the columns of `one`, and those of `other`
    as predicted_other, probability_other and right_other."""
    return one.join(other, on=["path", "label"], how="inner", suffix="_other", maintain_order="left")


def difference(both: pl.DataFrame) -> tuple[float, float, float]:
    """How much more often the other run is right on a table from `side_by_side`, as a share of the photographs, with a
    95 % interval for paired shares (Agresti and Min, 2005)."""
    gained, lost = (
        int((both[a] & ~both[b]).sum()) + 0.5 for a, b in (("right_other", "right"), ("right", "right_other"))
    )
    n = len(both) + 2
    centre = (gained - lost) / n
    half = Z * np.sqrt((gained + lost) / n - centre**2) / np.sqrt(n)
    return (gained - lost) / max(len(both), 1), float(centre - half), float(centre + half)
