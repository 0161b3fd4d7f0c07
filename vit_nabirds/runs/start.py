"""The weights that a run starts from: of a Hugging Face checkpoint, of another run, or none."""

from pathlib import Path

import jax
import numpy as np

from vit_nabirds.config import Config
from vit_nabirds.config.fields import SHAPE
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained.checkpoint import Checkpoint, open_checkpoint
from vit_nabirds.models.pretrained.hf_config import PARTS
from vit_nabirds.models.pretrained.names import mapping
from vit_nabirds.models.pretrained.tensors import Tensor
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.runs.checkpoints import base_checksum, sha256_of
from vit_nabirds.runs.loading import LoadedRun, is_run, open_run


def starting_point(config: Config, group: ProcessGroup) -> tuple[dict, Normalization, Checkpoint | None]:
    """Arguments of `VisionTransformer`, normalisation, and the checkpoint with the weights (None: random ones)."""
    wanted = config.model
    if wanted.pretrained:
        checkpoint = open_weights(wanted.pretrained, group)
        chosen = {"image_size": wanted.image_size or checkpoint.image_size}
        chosen["pool"] = wanted.pool or checkpoint.architecture["pool"]
        if chosen["image_size"] % (patch_size := checkpoint.architecture["patch_size"]):
            raise ConfigError(f"config.model.image_size is {chosen['image_size']}: choose a multiple of {patch_size}.")
        return checkpoint.architecture | chosen, checkpoint.normalization, checkpoint
    architecture = {field: getattr(wanted, field) for field in SHAPE}
    if missing := [field for field, value in architecture.items() if value is None]:
        raise ConfigError(
            f"config.model.{missing[0]} is not set: a model with random weights needs it (or name a checkpoint in "
            "config.model.pretrained)."
        )
    for field, divisor in {"image_size": "patch_size", "hidden_size": "num_heads"}.items():
        value, unit = architecture[field], architecture[divisor]
        if value % unit:
            raise ConfigError(f"config.model.{field} is {value}: choose a multiple of {divisor}, which is {unit}.")
    return architecture | {"pool": wanted.pool or "cls"}, Normalization(), None


def open_weights(name: str, group: ProcessGroup) -> Checkpoint:
    """What config.model.pretrained names: the workdir of a run, or the folder or Hub id of a Hugging Face checkpoint.

    All processes of the group call this together. UserError for what is missing or does not fit.
    """
    folder = Path(name).expanduser()
    if is_run(folder):
        return weights_of_run(name, group)  # Orbax waits for all processes, so that none may go first
    with group.writer_first(f"weights of {name}"):  # which it may fetch from the Hub
        return open_checkpoint(name)


def weights_of_run(name: str, group: ProcessGroup) -> Checkpoint:
    """The selected checkpoint of a run, as if it came from the Hub."""
    folder = Path(name).expanduser()
    run = open_run(folder)
    metadata = run.metadata
    shown = {"step": run.step, "data": metadata.fingerprint, "species": metadata.species}
    group.agree(f"the run in {name}", shown, f"All nodes must see the same {name}: try again.")
    arrays = _Arrays(folder, run)
    rows = mapping(metadata.architecture, len(metadata.species))
    tensors = {row.name: Tensor(row.shape, "F32", lambda row=row: row.to_theirs(arrays.pop(row.path))) for row in rows}
    source, size = f"{name}, step {run.step}", metadata.architecture["image_size"]
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


def pretrained_of(run: LoadedRun, group: ProcessGroup) -> dict[str, jax.Array]:
    """The weights that a run started from, by path and without a classifier, on all of the run's devices.

    UserError where they are gone or others.
    """
    name = run.metadata.config["model"]["pretrained"]
    params = open_weights(name, group).load(
        run.metadata.architecture, [], lambda array: devices.replicate(array, run.mesh)
    )
    # Earlier versions stored no checksum.
    if run.metadata.base and base_checksum(jax.tree.map(sha256_of, params)) != run.metadata.base:
        raise UserError(f"--wise needs the weights that the run started from, but {name} holds others now.")
    return {path: array for path, array in params.items() if not path.startswith("classifier/")}
