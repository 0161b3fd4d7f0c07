"""Where else than metrics.jsonl and the log a run reports to: TensorBoard, MLflow, Weights & Biases."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from vit_nabirds.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # that a tracker needs
INSTALLED = {"mlflow": "mlflow-skinny"}  # what pip knows some as
FINAL = "final/"  # begins the names of the figures that a finished run is compared by


class Backend(Protocol):
    """One tracker. Values of a step may come in several calls, in the order of the steps but for final ones."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, name: str, markdown: str) -> None: ...

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        """uint8 (height, width, 3)"""

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a tracker knows of a run before its first figures."""

    workdir: Path
    experiment: str  # that runs are compared in: the name of the configuration file
    start: int  # step that it goes on from
    params: dict[
        str, bool | int | float | str
    ]  # the configuration by dotted name, what differs from the defaults first
    changes: int = 0  # of the configuration on the way, with --accept_changes

    @property
    def name(self) -> str:
        return self.workdir.absolute().name


def check(names: tuple[str, ...]) -> None:
    """ConfigError where a tracker would not start: a package that is missing, or no key for its server."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"config.track has {name!r}, but the package {PACKAGES[name]} is not installed: "
                f"pip install {INSTALLED.get(name, name)}, or take it out of config.track."
            )
    if "wandb" in names:
        from vit_nabirds.runs.trackers.wandb import check_key

        check_key()


def keep_private(*variables: str) -> None:
    """Set these environment variables to 'true', unless the user has: before a tracker's package is imported."""
    for variable in variables:
        os.environ.setdefault(variable, "true")
