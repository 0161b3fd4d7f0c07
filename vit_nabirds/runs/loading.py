"""A run's workdir -> one of its checkpoints, ready for use."""

import contextlib
import dataclasses
import logging
import os
from pathlib import Path
from typing import Self

import jax
import numpy as np

from vit_nabirds.config import Config
from vit_nabirds.config.fields import with_defaults
from vit_nabirds.config.json_files import read_object
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.models.model import Model, describe
from vit_nabirds.models.pretrained.checkpoint import Checkpoint, open_checkpoint
from vit_nabirds.models.pretrained.hf_config import PARTS
from vit_nabirds.models.pretrained.names import mapping
from vit_nabirds.models.pretrained.tensors import Tensor
from vit_nabirds.parallel import devices
from vit_nabirds.runs.checkpoints import (
    Checkpoints,
    DamagedCheckpoint,
    Metadata,
    base_checksum,
    placed,
    sha256_of,
)  # fmt: skip
from vit_nabirds.runs.selection import Selection, metric_of

log = logging.getLogger("vit_nabirds")


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

    def seen_in(self, views: str | None) -> Self:
        """The run with other views of each photograph in evaluations; None: as in its training."""
        if views is None:
            return self
        try:
            config = Config.read(self.metadata.config).replace({"evaluate.views": views}).to_dict()
        except ConfigError as error:
            raise ConfigError(str(error).replace("config.evaluate.views", "--views")) from None
        return dataclasses.replace(self, metadata=dataclasses.replace(self.metadata, config=config))


def open_run(workdir: Path, step: int | None = None) -> LoadedRun:
    """The selected checkpoint of a run (the newest before the first evaluation), or that of a step.

    Its parameters are the moving averages where the run has some; low-rank changes are added to the weights under them.
    """
    missing = [name for name in ("checkpoints", "config.json") if not (workdir / name).exists()]
    if missing or not workdir.is_dir():
        lacks = ", ".join(f"no {name!r}" for name in missing)
        raise UserError(f"{workdir} holds no run ({lacks}): give the --workdir of a training.")
    try:
        config = Config.read(with_defaults(read_object(workdir / "config.json")))
    except (ValueError, UserError) as error:
        raise UserError(
            f"{workdir / 'config.json'} is damaged ({error}): run the training's command again to write a new one."
        ) from None
    devices.split_cpu(config.cpu_devices)  # before Orbax asks for devices
    mesh = devices.make_mesh()
    with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        steps = checkpoints.steps
        if not steps:
            raise UserError(f"{workdir / 'checkpoints'} holds no complete checkpoint yet.")
        if step not in (None, *steps):
            raise UserError(f"{workdir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
        while True:
            try:
                return _load(checkpoints, workdir, steps, step, config.model.pretrained, mesh)
            except DamagedCheckpoint as damage:
                if step is not None or len(steps) == 1 or jax.process_count() > 1:
                    raise
                steps = [other for other in steps if str(other) != damage.folder.name]
                log.warning("%s is damaged: the best of the others is used instead", damage.folder)


def _load(
    checkpoints: Checkpoints,
    workdir: Path,
    steps: list[int],
    step: int | None,
    pretrained: str,
    mesh: jax.sharding.Mesh,
) -> LoadedRun:
    """The checkpoint of a step, by default of the one that is selected among `steps`. `pretrained`: where the weights
    lie now that the run started from."""
    newest = checkpoints.metadata(steps[-1])
    selection = Selection.read(workdir, steps, metric_of(Config.read(newest.config)))
    selected = selection.best(steps)
    step = step or selected or steps[-1]
    metadata = checkpoints.metadata(step)
    metadata.config["model"]["pretrained"] = pretrained
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
    folder = Path(os.path.expanduser(source))
    need = f"the run trained low-rank changes of the weights of {source!r} and needs these: put them there again, or "
    need += "start the training once with --config.model.pretrained=FOLDER, where they are now"
    try:
        weights = as_checkpoint(open_run(folder), folder) if is_run(folder) else open_checkpoint(source)
        params = weights.load(metadata.architecture, [])
    except UserError as error:
        raise UserError(f"{need} ({error})") from None
    if base_checksum(jax.tree.map(sha256_of, params)) != metadata.base:
        raise UserError(f"{need} (others are there now).")
    return params


def is_run(folder: Path) -> bool:
    """Whether it is a run's workdir and not a Hugging Face folder, which has a config.json too."""
    named = (folder / "checkpoints").is_dir() and (folder / "config.json").is_file()
    return named and not any(folder.glob("*.safetensors"))


def as_checkpoint(run: LoadedRun, folder: Path) -> Checkpoint:
    """A run's checkpoint as if it came from the Hub."""
    metadata, arrays = run.metadata, _Arrays(folder, run)
    rows = mapping(metadata.architecture, len(metadata.species))
    tensors = {row.name: Tensor(row.shape, "F32", lambda row=row: row.to_theirs(arrays.pop(row.path))) for row in rows}
    source, size = f"{folder}, step {run.step}", metadata.architecture["image_size"]
    architecture = PARTS | metadata.architecture  # of random weights it has no parts
    return Checkpoint(
        source, folder, architecture, metadata.species, size, metadata.normalization, True, tensors
    )  # fmt: skip


class _Arrays:
    """The parameters of a checkpoint, each of which leaves the devices when it is taken; then they are read again."""

    def __init__(self, folder: Path, run: LoadedRun) -> None:
        self._folder, self._step, self._left = folder, run.step, dict(run.params)

    def pop(self, path: str) -> np.ndarray:
        """float32, on the host."""
        if path not in self._left:
            self._left = dict(open_run(self._folder, self._step).params)
        return np.asarray(self._left.pop(path), np.float32)
