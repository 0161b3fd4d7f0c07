"""The figures that a run reports: their names, how a reader wants to see them, and what they mean."""

from collections.abc import Callable
from typing import NamedTuple

SPLITS = {"train": "training", "val": "validation", "test": "test", "final": "final"}


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _number(value: float) -> str:
    """Three digits or more: '6.03', '512', '2,908'."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


class Quantity(NamedTuple):
    title: str
    shown: Callable[[float], str]  # the value with its unit
    unit: str  # of the number itself, as a curve shows it
    meaning: str
    in_words: str = "{title} {value}"


QUANTITIES = {
    "loss": Quantity("loss", "{:.4f}".format, "nats", "What is minimized, as a mean over the photographs."),
    "accuracy": Quantity("accuracy", percent, "share", "Photographs whose species is the likeliest one."),
    "top5_accuracy": Quantity("top-5 accuracy", percent, "share", "Photographs whose species is in the likeliest 5."),
    "mean_class_accuracy": Quantity(
        "mean class accuracy", percent, "share", "The mean of the accuracies of all species: rare ones count as much."
    ),
    "examples": Quantity("photographs", "{:,}".format, "", "Photographs that were scored.", "{value} {title}"),
    "mistake_distance": Quantity(
        "mistake distance", "{:.2f}".format, "steps", "Steps in the tree of species from a mistake to the truth, in "
        "the mean: low where mistakes are among relatives.",
    ),
    "learning_rate": Quantity("learning rate", "{:.3g}".format, "", "Of the optimizer, before the factors of rules."),
    "gradient_norm": Quantity(
        "gradient norm", _number, "", "Of all gradients together, before they are clipped: a jump announces trouble."
    ),
    "bad_steps": Quantity("bad steps", "{:,}".format, "", "Steps that changed nothing: loss or gradient not finite."),
    "images_per_second": Quantity(
        "throughput", _number, "images/s", "Photographs trained on a second, over all devices, since the last point.",
        "{value} images/s",
    ),
    "input_wait": Quantity(
        "input wait", percent, "share", "Time that the host waited for photographs. Above 5 %, raise data.workers or "
        "prepare with --pack.",
    ),
    "mfu": Quantity(
        "MFU", percent, "share", "Matrix products of the step, with those that remat repeats, as a share of what the "
        "data sheet of the GPU promises.",
    ),
    "memory_gib": Quantity(
        "memory", lambda value: f"{value:.2f} GiB", "GiB", "The most that was taken so far on a device of the first "
        "process; without accelerators, by that process.",
    ),
}  # fmt: skip


def quantity_of(name: str) -> Quantity:
    """Of a figure like 'val/accuracy'; one that is not known is shown as it is."""
    short = name.rpartition("/")[2]
    if short.startswith("accuracy_level"):
        level = short.removeprefix("accuracy_level")
        meaning = f"Photographs whose group at level {level} of the tree, counted from its root, is right."
        return Quantity(f"accuracy at level {level}", percent, "share", meaning)
    return QUANTITIES.get(short) or Quantity(short.replace("_", " "), "{:.4g}".format, "", "")


def in_words(values: dict[str, float]) -> str:
    """Like 'loss 0.2345, accuracy 93.8 %', or 'validation: loss …'. All are of one split."""
    split = next(iter(values)).partition("/")[0]
    found = [(quantity_of(name), value) for name, value in values.items()]
    words = ", ".join(q.in_words.format(title=q.title, value=q.shown(value)) for q, value in found)
    return words if split == "train" else f"{SPLITS.get(split, split)}: {words}"


def time_in_words(seconds: float) -> str:
    """'9 s', '3 min 20 s', '1 h 12 min', '2 d'."""
    seconds = max(round(seconds), 0)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size:,} {unit}" + f" {rest} {name}" * bool(rest)
    return f"{seconds} s"
