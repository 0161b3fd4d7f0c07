"""The workdir of a training -> one of its checkpoints, loaded for use."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
from flax import nnx

from vit_nabirds.runs import checkpoints as checkpoint
from vit_nabirds.parallel import devices
from vit_nabirds.models import vit as model
from vit_nabirds.errors import UserError
from vit_nabirds.runs.selection import Selection


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a run, its parameters replicated over the mesh."""

    step: int
    about: checkpoint.About
    metrics: dict[str, float]  # of its evaluation; none when there was no evaluation at this step
    graphdef: nnx.GraphDef
    params: dict[str, jax.Array]
    mesh: jax.sharding.Mesh


def open_run(workdir: Path, step: int | None = None) -> Run:
    """The best checkpoint of a run, the newest before the first evaluation, or that of a step."""
    if not (workdir / "checkpoints").is_dir() or not (workdir / "config.json").is_file():
        raise UserError(
            f"{workdir} holds no run (no 'checkpoints', no 'config.json'): give the --workdir of a training."
        )
    try:
        cpu_devices = int(json.loads((workdir / "config.json").read_text())["cpu_devices"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{workdir / 'config.json'} is damaged: run the training's command again to write it anew."
        ) from None
    with contextlib.suppress(RuntimeError):  # JAX is in use already, in a notebook: any number of devices will do
        devices.split_cpu(cpu_devices)  # before Orbax asks for devices
    mesh = devices.make_mesh()
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    steps = checkpoints.steps
    if not steps:
        raise UserError(f"{workdir / 'checkpoints'} holds no complete checkpoint yet.")
    selection = Selection.read(workdir, steps)
    if step is None:
        step = selection.best(steps) or steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    about = checkpoints.about(step)
    graphdef, like = model.describe(about.architecture, len(about.species), about.config["compute_dtype"])
    params = checkpoints.restore(step, {"params": checkpoint.placed(like, devices.replicated(mesh))})["params"]
    checkpoints.close()
    return Run(step, about, selection.evaluations.get(step, {}), graphdef, params, mesh)
