"""Score a run's best checkpoint, or that of a step, on the test photographs, and print a line of JSON."""

import json
import logging
from pathlib import Path

from vit_nabirds.errors import UserError

REQUIRED = ("workdir",)
FLAGS = {
    "workdir": (str, "Folder of the run."),
    "step": (int, "Step of the checkpoint (default: the best)."),
    "data_root": (str, "Prepared folder (default: the one that the run was trained on)."),
}
PARALLEL = True
CONFIGURED = False

log = logging.getLogger("vit_nabirds")


def run(options, group) -> int:
    from vit_nabirds.parallel.launchers import check_same_program

    check_same_program(group, {})
    return evaluate(Path(options.workdir), options.step, options.data_root, group.is_writer)


def evaluate(workdir: Path, step: int | None = None, root: str | None = None, is_writer: bool = True) -> int:
    """Score a checkpoint of a run, by default its best; returns the exit code."""
    from vit_nabirds.data.photographs import check_sizes, open_split
    from vit_nabirds.data.table import fingerprint, read_table, species_differences, species_names
    from vit_nabirds.evaluation.scoring import make_eval_step, score
    from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest
    from vit_nabirds.runs.loading import open_run

    run = open_run(workdir, step)
    metadata, config = run.metadata, run.metadata.config
    root = Path(root or config["data"]["root"])
    table = read_table(root)
    if (species := species_names(table)) != metadata.species:
        raise UserError(
            f"{root} has other species than the run ({species_differences(metadata.species, species)}): give the data "
            "of the training with --data_root."
        )
    photographs = open_split(root, table, train=False)
    check_sizes(photographs, photographs, metadata.architecture["image_size"])
    if fingerprint(root, table) != metadata.fingerprint:
        log.warning("%s has other records or images than the training had", root)

    log.info("evaluating the checkpoint of step %d on %d photographs of %s", run.step, len(photographs), root)
    with StopRequest(speaks=is_writer) as stop:
        metrics = score(
            make_eval_step(run.model, metadata.normalization), run.params, photographs, len(species),
            config["batch_size"], -1, run.mesh, stop,
        )  # fmt: skip
    if metrics is None:
        return EXIT_STOPPED
    if is_writer:
        scores = {name.removeprefix("test/"): value for name, value in metrics.items()}
        print(json.dumps({"step": run.step, "test": scores}))
    return 0
