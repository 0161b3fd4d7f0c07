"""A run's workdir -> one of its checkpoints, ready for use."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax

from vit_nabirds.config import Config
from vit_nabirds.errors import UserError
from vit_nabirds.models.model import Model, describe
from vit_nabirds.parallel import devices
from vit_nabirds.runs.checkpoints import Checkpoints, Metadata, placed
from vit_nabirds.runs.selection import Selection, metric_of


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """One checkpoint of a run, its parameters by path replicated over the mesh."""

    step: int
    selected_by: str | None  # the metric, like "val/accuracy"; None for another step, and where nothing is selected
    metadata: Metadata
    figures: dict[str, float]  # of its evaluation, like "val/accuracy"; empty if there was none at this step
    test: dict[str, float | list[float]]  # its final scores on the test photographs; empty without them
    model: Model
    params: dict[str, jax.Array]
    mesh: jax.sharding.Mesh


def open_run(workdir: Path, step: int | None = None) -> LoadedRun:
    """The selected checkpoint of a run (the newest before the first evaluation), or that of a step."""
    if not (workdir / "checkpoints").is_dir() or not (workdir / "config.json").is_file():
        raise UserError(
            f"{workdir} holds no run (no 'checkpoints', no 'config.json'): give the --workdir of a training."
        )
    try:
        cpu_devices = int(json.loads((workdir / "config.json").read_text())["cpu_devices"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{workdir / 'config.json'} is damaged: run the training's command again to write a new one."
        ) from None
    devices.split_cpu(cpu_devices)  # before Orbax asks for devices
    mesh = devices.make_mesh()
    with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        steps = checkpoints.steps
        if not steps:
            raise UserError(f"{workdir / 'checkpoints'} holds no complete checkpoint yet.")
        newest = checkpoints.metadata(steps[-1])
        selection = Selection.read(workdir, steps, metric_of(Config.read(newest.config)))
        selected = selection.best(steps)
        if step is None:
            step = selected or steps[-1]
        if step not in steps:
            raise UserError(f"{workdir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
        metadata = checkpoints.metadata(step)
        model = describe(metadata.architecture, len(metadata.species), metadata.config["compute_dtype"])
        like = {"params": placed(model.shapes, devices.replicated(mesh))}
        params = checkpoints.restore(step, like)["params"]
    figures, test = selection.evaluations.get(step, {}), selection.tests.get(step, {})
    selected_by = selection.metric if step == selected else None
    return LoadedRun(step, selected_by, metadata, figures, test, model, params, mesh)
