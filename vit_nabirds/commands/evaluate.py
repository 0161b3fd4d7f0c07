"""Score a run's selected checkpoint, or that of a step, on the test photographs, and print a line of JSON."""

import json
import logging
from pathlib import Path

from vit_nabirds.errors import ConfigError, UserError

REQUIRED = ("workdir",)
FLAGS = {
    "workdir": (str, "Folder of the run."),
    "step": (int, "Step of the checkpoint (default: the selected one)."),
    "data_root": (str, "Prepared folder (default: the one that the run was trained on)."),
    "views": (str, "Of each photograph, whose logits are averaged: one, flip or ten (default: as in the training)."),
    "wise": (str, "Share of the run's weights, the rest are pretrained ones: 0 to 1, or auto (by validation)."),
}
PARALLEL = True
CONFIGURED = ""

log = logging.getLogger("vit_nabirds")


def run(options, group) -> int:
    from vit_nabirds.parallel.join import check_same_program

    check_same_program(group, {})
    return evaluate(Path(options.workdir), options.step, options.data_root, group, options.wise, options.views)


def evaluate(
    workdir: Path,
    step: int | None = None,
    root: str | None = None,
    group=None,
    wise: str | None = None,
    views: str | None = None,
) -> int:
    """Score a checkpoint of a run, by default the selected one; returns the exit code."""
    from vit_nabirds.config import Config
    from vit_nabirds.evaluation.wise import AUTO, check_share, mixed, share_of
    from vit_nabirds.parallel.group import ProcessGroup
    from vit_nabirds.parallel.preemption import EXIT_STOPPED, StopRequest
    from vit_nabirds.parallel.watchdog import Watchdog
    from vit_nabirds.runs.loading import open_run

    share = None if wise is None else share_of(wise)
    run, group = open_run(workdir, step).seen_in(views), group or ProcessGroup()
    if share is not None:
        check_share(share, run)
    root = Path(root or run.metadata.config["data"]["root"])
    table, found = data_of(run, root, needs_validation=share == AUTO)
    scorer = scorer_of(run, root, table, "test")
    validation = scorer_of(run, root, table, "validation") if share == AUTO else None
    shown = {"step": run.step, "selected": run.selected_by, "data": found, "wise": share, "views": views}
    group.agree("what is evaluated", shown, f"All nodes must see the same data and the same {workdir}: try again.")

    timeout = Config.read(run.metadata.config).watchdog_timeout.seconds
    with StopRequest(speaks=group.is_writer) as stop, Watchdog(timeout, group) as watchdog:
        if share is not None:
            if (answer := mixed(run, share, validation, group, stop)) is None:
                return EXIT_STOPPED
            run, share = answer
        count = len(scorer.photographs)
        log.info("evaluating the checkpoint of step %d on %d photographs of %s", run.step, count, root)
        scores = scorer.score(run.params, stop, watchdog.waits_for)
    if scores is None:
        return EXIT_STOPPED
    if group.is_writer:
        mixture = {} if share is None else {"wise": share}
        print(json.dumps({"step": run.step, "selected_by": run.selected_by, **mixture, "test": scores.as_json()}))
    return 0


def data_of(run, root: Path, needs_validation: bool = False):
    """The table of a prepared folder, and its fingerprint; UserError if its classes are not those of the run."""
    from vit_nabirds.config import Config
    from vit_nabirds.data.table import class_differences, class_names, fingerprint

    metadata = run.metadata
    table = table_of(root, Config.read(metadata.config).data, needs_validation)
    if (classes := class_names(table)) != metadata.species:
        raise UserError(
            f"{root} has other classes than the run ({class_differences(metadata.species, classes)}): give the data "
            "of the training with --data_root."
        )
    if (found := fingerprint(root, table)) != metadata.fingerprint:
        log.warning("%s has other records or images than the training had", root)
    return table, found


def scorer_of(run, root: Path, table, split: str):
    """What scores parameters of a run on the "test" or "validation" photographs of a prepared folder."""
    from vit_nabirds.config import Config
    from vit_nabirds.data.photographs import check_sizes, open_split
    from vit_nabirds.data.taxonomy import read_taxonomy
    from vit_nabirds.data.unread import Unread
    from vit_nabirds.evaluation.scoring import Scorer, make_eval_step

    metadata, config = run.metadata, Config.read(run.metadata.config)
    photographs = open_split(root, table, split)
    check_sizes(metadata.architecture["image_size"], photographs)
    return Scorer(
        make_eval_step(run.model, metadata.normalization, run.mesh, config.evaluate.views), photographs,
        Unread(photographs, config.data.tolerated), len(metadata.species), config.batch_size, run.mesh,
        read_taxonomy(root, table), workers=-1,
    )  # fmt: skip


def table_of(root: Path, data, needs_validation: bool = False):
    """The table as a run with the section `data` of its configuration has split it, if it can be split like that."""
    from vit_nabirds.data.table import read_table

    try:
        return read_table(root, data.label, data.validation)
    except ConfigError as error:
        if needs_validation:
            raise ConfigError(f"--wise=auto chooses by validation photographs, but {error} Or give a number.") from None
        # too few training photographs to hold any out, but none are needed
        return read_table(root, data.label)
