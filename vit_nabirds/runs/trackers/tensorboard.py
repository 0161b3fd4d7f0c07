"""TensorBoard: grouped curves that say what they are, hyperparameters to compare runs by, text and pictures."""

import numpy as np
from tensorboard.compat.proto import summary_pb2
from tensorboardX import summary
from tensorboardX.proto.summary_pb2 import Summary

from vit_nabirds.runs.events import Events
from vit_nabirds.runs.quantities import SPLITS, quantity_of
from vit_nabirds.runs.trackers import FINAL, RunInfo


class TensorBoard:
    def __init__(self, info: RunInfo) -> None:
        self._events, self._described = Events(info.workdir / "tensorboard", info.start + 1), set()
        # Without a list of columns, TensorBoard puts those first in which runs differ.
        _, session, self._end = summary.hparams(info.params, {})
        self._events.add(0, session)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._events.add(step, *(self._scalar(name, value) for name, value in values.items()))
        if any(name.startswith(FINAL) for name in values):
            self._events.add(step, self._end)

    def _scalar(self, name: str, value: float) -> Summary:
        """With its name and meaning, which TensorBoard takes from the first one of a curve."""
        if name in self._described:
            return summary.scalar(name, value)
        self._described.add(name)
        quantity, split = quantity_of(name), name.partition("/")[0]
        metadata = summary_pb2.SummaryMetadata(
            plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="scalars"),
            display_name=f"{SPLITS.get(split, split)} {quantity.title}" + f" [{quantity.unit}]" * bool(quantity.unit),
            summary_description=quantity.meaning,
            data_class=summary_pb2.DATA_CLASS_SCALAR,  # which tensorboardX does not know
        )
        point = summary_pb2.Summary.Value(tag=name, simple_value=value, metadata=metadata)
        return Summary.FromString(summary_pb2.Summary(value=[point]).SerializeToString())

    def text(self, name: str, markdown: str) -> None:
        self._events.add(0, summary.text(name, markdown))

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        self._events.add(step, summary.image(name, picture, dataformats="HWC"))

    def close(self) -> None:
        self._events.close()
