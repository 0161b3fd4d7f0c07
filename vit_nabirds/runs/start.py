"""The weights that a run starts from: of a Hugging Face checkpoint, of another run, or none."""

import os
from pathlib import Path

import jax

from vit_nabirds.config import Config
from vit_nabirds.config.fields import SHAPE
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.models.limits import problem_of
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained.checkpoint import Checkpoint, open_checkpoint
from vit_nabirds.models.pretrained.hf_config import PARTS
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.runs.checkpoints import base_checksum, sha256_of
from vit_nabirds.runs.loading import LoadedRun, as_checkpoint, is_run, open_run


def starting_point(config: Config, group: ProcessGroup) -> tuple[dict, Normalization, Checkpoint | None]:
    """Arguments of `VisionTransformer`, normalisation, and the checkpoint with the weights (None: random ones)."""
    wanted = config.model
    if wanted.pretrained:
        checkpoint = open_weights(wanted.pretrained, group)
        chosen = {"image_size": wanted.image_size or checkpoint.image_size}
        chosen["pool"] = wanted.pool or checkpoint.architecture["pool"]
        _check_size(checkpoint.architecture | chosen)
        return checkpoint.architecture | chosen, checkpoint.normalization, checkpoint
    architecture = {field: getattr(wanted, field) for field in SHAPE}
    if missing := [field for field, value in architecture.items() if value is None]:
        raise ConfigError(
            f"config.model.{missing[0]} is not set: a model with random weights needs it (or name a checkpoint in "
            "config.model.pretrained)."
        )
    _check_size(PARTS | architecture)
    return architecture | {"pool": wanted.pool or "cls"}, Normalization(), None


def _check_size(architecture: dict) -> None:
    """ConfigError for sizes that do not fit together, or that no transformer has."""
    if problem := problem_of(architecture):
        field, expected = problem
        raise ConfigError(f"config.model.{field} is {architecture[field]}: choose {expected}.")


def open_weights(name: str, group: ProcessGroup) -> Checkpoint:
    """What config.model.pretrained names: the workdir of a run, or the folder or Hub id of a Hugging Face checkpoint.

    All processes of the group call this together. UserError for what is missing or does not fit.
    """
    folder = Path(os.path.expanduser(name))
    if is_run(folder):
        run = open_run(folder)  # Orbax waits for all processes, so that none may go first
        shown = {"step": run.step, "data": run.metadata.fingerprint, "species": run.metadata.species}
        group.agree(f"the run in {name}", shown, f"All nodes must see the same {name}: try again.")
        return as_checkpoint(run, folder)
    with group.writer_first(f"weights of {name}"):  # which it may fetch from the Hub
        return open_checkpoint(name)


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
