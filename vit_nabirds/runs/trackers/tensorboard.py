"""TensorBoard: grouped curves that say what they are, hyperparameters to compare runs by, text and pictures."""

import numpy as np
from tensorboardX import summary

from vit_nabirds.runs.events import Events
from vit_nabirds.runs.quantities import SPLITS, quantity_of
from vit_nabirds.runs.trackers import FINAL, RunInfo

FINALS = ("accuracy", "mean_class_accuracy", "top5_accuracy", "loss", "val_accuracy")  # columns of the table


class TensorBoard:
    def __init__(self, info: RunInfo) -> None:
        self._events, self._described = Events(info.workdir / "tensorboard", info.start + 1), set()
        experiment, session, self._end = summary.hparams(info.params, dict.fromkeys(map(FINAL.__add__, FINALS)))
        self._events.add(0, experiment, session)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._events.add(step, *(self._scalar(name, value) for name, value in values.items()))
        if any(name.startswith(FINAL) for name in values):
            self._events.add(step, self._end)

    def _scalar(self, name: str, value: float):
        """With its name and meaning, which TensorBoard takes from the first one of a curve."""
        if name in self._described:
            return summary.scalar(name, value)
        self._described.add(name)
        quantity, split = quantity_of(name), name.partition("/")[0]
        unit = f" [{quantity.unit}]" if quantity.unit else ""
        return summary.scalar(name, value, f"{SPLITS.get(split, split)} {quantity.title}{unit}", quantity.meaning)

    def text(self, name: str, markdown: str) -> None:
        self._events.add(0, summary.text(name, markdown))

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        self._events.add(step, summary.image(name, picture, dataformats="HWC"))

    def close(self) -> None:
        self._events.close()
