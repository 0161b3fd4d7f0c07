"""Score a run's selected checkpoint, or that of a step, on the test photographs, and print a line of JSON."""

import json
import logging
from pathlib import Path

from vit_nabirds.errors import UserError

REQUIRED = ("workdir",)
FLAGS = {
    "workdir": (str, "Folder of the run."),
    "step": (int, "Step of the checkpoint (default: the selected one)."),
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
    """Score a checkpoint of a run, by default the selected one; returns the exit code."""
    from vit_nabirds.config import Config
    from vit_nabirds.data.photographs import check_sizes, open_split
    from vit_nabirds.data.table import class_differences, class_names, fingerprint, read_table
    from vit_nabirds.data.taxonomy import read_taxonomy
    from vit_nabirds.data.unread import Unread
    from vit_nabirds.evaluation.scoring import Scorer, make_eval_step
    from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest
    from vit_nabirds.runs.loading import open_run

    run = open_run(workdir, step)
    metadata, config = run.metadata, Config.read(run.metadata.config)
    data = config.data
    root = Path(root or data.root)
    table = read_table(root, data.label, data.validation)
    if (classes := class_names(table)) != metadata.species:
        raise UserError(
            f"{root} has other classes than the run ({class_differences(metadata.species, classes)}): give the data "
            "of the training with --data_root."
        )
    photographs = open_split(root, table, "test")
    check_sizes(photographs, photographs, metadata.architecture["image_size"])
    if fingerprint(root, table) != metadata.fingerprint:
        log.warning("%s has other records or images than the training had", root)

    log.info("evaluating the checkpoint of step %d on %d photographs of %s", run.step, len(photographs), root)
    unread = Unread(photographs, data.tolerated)
    scorer = Scorer(
        make_eval_step(run.model, metadata.normalization, run.mesh), photographs, unread, len(classes),
        config.batch_size, run.mesh, read_taxonomy(root, table), workers=-1,
    )  # fmt: skip
    with StopRequest(speaks=is_writer) as stop:
        scores = scorer.score(run.params, stop)
    if scores is None:
        return EXIT_STOPPED
    if is_writer:
        print(json.dumps({"step": run.step, "selected_by": run.selected_by, "test": scores.as_json()}))
    return 0
