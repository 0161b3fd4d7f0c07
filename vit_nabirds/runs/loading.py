"""A run's workdir -> one of its checkpoints, ready for use."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from vit_nabirds.config import Config
from vit_nabirds.errors import UserError
from vit_nabirds.models.model import Model, describe
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.positions import resize_positions
from vit_nabirds.parallel import devices
from vit_nabirds.runs.checkpoints import Checkpoints, Metadata, base_checksum, placed, sha256_of
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
    """The selected checkpoint of a run (the newest before the first evaluation), or that of a step.

    Its parameters are the moving averages where the run has some; low-rank changes are added to the weights under them.
    """
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
        params = _restore(checkpoints, step, metadata, model, mesh)
    figures, test = selection.evaluations.get(step, {}), selection.tests.get(step, {})
    selected_by = selection.metric if step == selected else None
    return LoadedRun(step, selected_by, metadata, figures, test, model, params, mesh)


def _restore(
    checkpoints: Checkpoints, step: int, metadata: Metadata, plain: Model, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """All parameters of the plain model, one without LoRA, from a checkpoint."""
    config = Config.read(metadata.config)
    model = plain
    if config.lora.rank:
        model = describe(plain.architecture, plain.num_classes, config.compute_dtype, lora=config.lora)
    paths = {"params": model.stored_paths} | ({"ema": checkpoints.paths(step, "ema")} if config.ema_decay else {})
    like = {part: {path: model.shapes[path] for path in paths[part] if path in model.shapes} for part in paths}
    parts = checkpoints.restore(step, placed(like, devices.replicated(mesh)))
    params = parts["params"] | parts.get("ema", {})
    if not config.lora.rank:
        return params
    base = {path: devices.replicate(array, mesh) for path, array in base_params(metadata).items()}
    return jax.jit(model.merged)(base | params)


def base_params(metadata: Metadata) -> dict[str, np.ndarray]:
    """What LoRA changes, but the classifier: float32 by path on the host, of the weights that the run started from.

    UserError where they are gone or others.
    """
    source = metadata.config["model"]["pretrained"]
    need = f"the run trained low-rank changes of the weights of {source!r} and needs these: put them there again"
    try:
        params = _weights_of(source, metadata.architecture)
    except UserError as error:
        raise UserError(f"{need} ({error})") from None
    if base_checksum(jax.tree.map(sha256_of, params)) != metadata.base:
        raise UserError(f"{need} (others are there now).")
    return params


def is_run(folder: Path) -> bool:
    """Whether it is a run's workdir and not a Hugging Face folder, which has a config.json too."""
    named = (folder / "checkpoints").is_dir() and (folder / "config.json").is_file()
    return named and not any(folder.glob("*.safetensors"))


def _weights_of(source: str, architecture: dict) -> dict[str, np.ndarray]:
    """Parameters of a run or a Hugging Face checkpoint without the classifier, its positions resized."""
    if not is_run(folder := Path(source).expanduser()):
        return open_checkpoint(source).load(architecture, [])
    run = open_run(folder)
    params = {path: np.asarray(x) for path, x in run.params.items() if not path.startswith("classifier/")}
    old, new = (a["image_size"] // a["patch_size"] for a in (run.metadata.architecture, architecture))
    if old != new:
        antialias = architecture["num_registers"] > 0
        params["position_embeddings"] = resize_positions(params["position_embeddings"], new, antialias)
    return params
