"""Figures of a whole split from its confusion matrix, and how sure they are."""

import numpy as np

from vit_nabirds.data.taxonomy import Taxonomy

Z = 1.959964  # of a standard normal: 95 % lie within


def figures_of(confusion: np.ndarray, top5: int, loss: float, taxonomy: Taxonomy | None = None) -> dict[str, float]:
    """Means over the photographs, from int (classes, classes) counts of (label, prediction) and sums of the rest."""
    examples, per_class, right = confusion.sum(), confusion.sum(1), confusion.diagonal()
    seen = per_class > 0
    figures = {
        "loss": float(loss / examples),
        "accuracy": float(right.sum() / examples),
        "top5_accuracy": float(top5 / examples),
        "mean_class_accuracy": float(np.mean(right[seen] / per_class[seen])),
        "examples": int(examples),
    }
    return figures | (_in_tree(confusion, taxonomy) if taxonomy else {})


def _in_tree(confusion: np.ndarray, taxonomy: Taxonomy) -> dict[str, float]:
    """Accuracy at each level above the classes, and the mean length of the way from a mistake to the truth."""
    labels, predictions = np.nonzero(confusion)
    counts = confusion[labels, predictions]
    agreed = counts @ taxonomy.agrees(labels, predictions) / counts.sum()
    figures = {f"accuracy_level{level}": float(share) for level, share in enumerate(agreed[:-1], start=1)}
    wrong = labels != predictions
    if wrong.any():
        distances = taxonomy.distance(labels[wrong], predictions[wrong])
        figures["mistake_distance"] = float(counts[wrong] @ distances / counts[wrong].sum())
    return figures


def intervals_of(figures: dict[str, float], confusion: np.ndarray) -> dict[str, list[float]]:
    """A 95 % interval for each accuracy: Wilson's."""
    per_class = confusion.sum(1)
    per_class = per_class[per_class > 0]
    # The mean over classes varies as the accuracy on so many photographs does, were all classes equally hard.
    effective = len(per_class) ** 2 / (1 / per_class).sum()
    return {
        f"{name}_interval": wilson(value, effective if name.startswith("mean") else figures["examples"])
        for name, value in figures.items()
        if "accuracy" in name
    }


def wilson(share: float, n: float) -> list[float]:
    """The interval [low, high] in which a share measured on n examples lies with 95 % confidence (Wilson, 1927)."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return [max(float(centre - half), 0.0), min(float(centre + half), 1.0)]
