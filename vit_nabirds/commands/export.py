"""Write a run's checkpoint as a folder that Hugging Face's transformers loads."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from vit_nabirds.errors import UserError

log = logging.getLogger("vit_nabirds")

REQUIRED = ("workdir", "out")
FLAGS = {
    "workdir": (str, "Folder of the run."),
    "step": (int, "Step of the checkpoint (default: the selected one)."),
    "out": (str, "Folder to write; it must not exist."),
    "push": (str, "Upload the folder, too: ORG/NAME on the Hugging Face Hub, which is private if it is new."),
    "wise": (str, "Share of the run's weights, the rest are pretrained ones: 0 to 1, or auto (by validation)."),
}
PARALLEL = False
CONFIGURED = ""


def run(options, group) -> int:
    from vit_nabirds.models.pretrained.hub import check_upload, upload

    if options.push is not None:
        check_upload(options.push)
    out = Path(options.out)
    export(Path(options.workdir), out, options.step, options.wise, options.push)
    if options.push is not None:
        log.info("%s", upload(out, options.push))
    return 0


def export(workdir: Path, out: Path, step: int | None = None, wise: str | None = None, name: str | None = None) -> None:
    """Write the folder `out`, which must not exist, from a run's selected checkpoint or that of a step.

    `name` is the model's in its card: the folder's by default.
    """
    check_new(out)
    from vit_nabirds.evaluation.card import model_card
    from vit_nabirds.evaluation.wise import share_of
    from vit_nabirds.models.pretrained.export import save_checkpoint
    from vit_nabirds.runs.loading import open_run

    share = None if wise is None else share_of(wise)
    opened = open_run(workdir, step)
    if share is not None:
        opened, share = between(opened, share)
    metadata = opened.metadata
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_checkpoint(
            unfinished, metadata.architecture, opened.params, metadata.species, metadata.normalization, metadata.crop
        )  # fmt: skip
        (unfinished / "README.md").write_text(model_card(opened, name or out.name, share))
        unfinished.chmod(0o755)  # mkdtemp and safetensors make them private
        (unfinished / "model.safetensors").chmod(0o644)
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    species = len(metadata.species)
    log.info("%s holds the checkpoint of step %d of %s, for %d species", out, opened.step, workdir, species)


def check_new(out: Path) -> None:
    """UserError unless a folder can be made there."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out, or remove it first.")
    if files := [folder for folder in out.absolute().parents if folder.exists() and not folder.is_dir()]:
        raise UserError(f"--out={out}: {files[0]} is a file, not a folder. Choose another --out.")


def between(opened, share: float | str):
    """The run with a share of its own weights, and the share; `evaluation.wise` says how."""
    from vit_nabirds.commands.evaluate import data_of, scorer_of
    from vit_nabirds.evaluation.wise import AUTO, check_share, mixed
    from vit_nabirds.parallel.group import ProcessGroup
    from vit_nabirds.parallel.preemption import StopRequest

    check_share(share, opened)
    validation = None
    if share == AUTO:
        root = Path(opened.metadata.config["data"]["root"])
        validation = scorer_of(opened, root, data_of(opened, root, needs_validation=True)[0], "validation")
    return mixed(opened, share, validation, ProcessGroup(), StopRequest())
