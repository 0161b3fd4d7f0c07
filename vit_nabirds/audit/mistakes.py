"""Mistakes that do not depend on each other, of which the preparation of a run reports the first alone."""

import functools
from collections.abc import Iterator
from pathlib import Path

from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.data.batches import check_workers
from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import UserError
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.runs.start import starting_point
from vit_nabirds.training.run import check_batch_size, check_workdir


def mistakes(config: Config, workdir: Path, group: ProcessGroup, devices: int, first: UserError) -> Iterator[str]:
    """`first`, and what else `prepare_run` would report once that is put right, as far as it can be known."""
    yield str(first)
    checks = [
        functools.partial(check_workers, config.data.workers),
        functools.partial(check_batch_size, config, devices),
        functools.partial(check_data, config),
        functools.partial(check_workdir, workdir),
    ]
    if not (workdir / "checkpoints").is_dir():  # else the run goes on from its own weights
        checks.append(functools.partial(starting_point, config, group))
    for check in checks:
        try:
            check()
        except UserError as error:
            if str(error) != str(first):
                yield str(error)


def check_data(config: Config) -> None:
    """UserError if the splits cannot be opened, or the run's length does not fit them."""
    root = Path(config.data.root)
    table = read_table(root, config.data.label, config.data.validation)
    for split in ("test", "validation"):
        if split == "test" or config.data.validation:
            open_split(root, table, split)
    Plan.of(config, len(open_split(root, table, "train")))
