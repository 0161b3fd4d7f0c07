"""The photographs of a run: how many each class has, whether they are there, and whether they can be read."""

import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from vit_nabirds.audit.findings import Findings, counted
from vit_nabirds.data.images import ImageFiles
from vit_nabirds.data.photographs import SPLITS, Photographs
from vit_nabirds.data.prepare import list_files
from vit_nabirds.data.unread import Unread
from vit_nabirds.errors import UserError, quoted
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.terminal import progress
from vit_nabirds.training.run import Run

NAMED = 5  # photographs or classes of a list
UNEVEN = 20  # times as many photographs in the largest class as in the smallest
AHEAD = 64  # photographs that a thread may read before the bar moves
LACKING = {
    "train": "nothing is learned of them",
    "validation": "they do not count when a checkpoint is selected (docs/data.md)",
    "test": "their accuracy is not measured",
}


def of_classes(run: Run) -> Findings:
    """How many photographs each class has."""
    names, data = run.metadata.species, run.config.data
    counts = {name: np.bincount(split.labels, minlength=len(names)) for name, split in run.splits.items()}
    warnings = []
    for name, count in counts.items():
        if lacking := [quoted(names[label]) for label in np.flatnonzero(count == 0)]:
            which = few(lacking, ", ")
            warnings.append(
                f"{len(lacking):,} of {len(names):,} classes have no {SPLITS[name]} photograph, so {LACKING[name]}: "
                f"{which}"
            )
    most, least = counts["train"].argmax(), np.where(counts["train"], counts["train"], np.iinfo(int).max).argmin()
    largest, smallest = (int(counts["train"][label]) for label in (most, least))
    if largest > UNEVEN * smallest and data.sampling == "uniform" and run.config.loss.class_weights == "none":
        warnings.append(
            f"the classes are uneven: {quoted(names[most])} has {largest:,} training photographs, "
            f"{quoted(names[least])} {smallest:,}. --config.data.sampling=sqrt or --config.loss.class_weights=balanced "
            "may help the small ones (docs/recipes.md)."
        )
    span = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    return Findings([f"classes      {span} training photographs each"], [], warnings)


def missing(run: Run) -> Findings:
    """Photographs whose files are not there, by the lists of their folders: no file is opened."""
    return _judged(run, {name: list(_absent(split)) for name, split in run.splits.items()}, "are missing")


def damaged(run: Run) -> Findings:
    """Decodes every photograph and compares it with its checksum."""
    started, found = time.perf_counter(), {}
    for name, split in run.splits.items():
        checked = progress(_problems(split), len(split), "photographs", SPLITS[name])
        found[name] = [problem for problem in checked if problem]
    count = sum(map(len, run.splits.values()))
    speed, what = count / (time.perf_counter() - started), "copied" if run.train_split.is_packed else "decoded"
    checked = (
        f"deep         {counted(count, 'photograph')} {what}, {speed:,.0f} a second on {counted(cpu_share(), 'core')}"
    )
    if isinstance(run.train_split.images, ImageFiles) and run.train_split.images.crc32 is None:
        checked += "; their folder has no checksums, so changes are not seen"
    judged = _judged(run, found, "cannot be read, or have changed since `prepare`")
    return Findings([checked], judged.problems, judged.warnings)


def _absent(split: Photographs) -> Iterator[str]:
    if split.is_packed:  # its size was checked when it was opened
        return
    folder, paths = split.images.folder, split.images.paths.gather(split.indices)
    present = list_files(folder, {os.path.dirname(path) for path in paths.unique()})
    for path in paths.filter(~paths.is_in(pl.Series(list(present), dtype=pl.String).implode())):
        yield quoted(folder / path, 1000)


def _problems(split: Photographs) -> Iterator[str | None]:
    """For each photograph, in order, what is wrong with it."""
    ahead = AHEAD * cpu_share()
    with ThreadPoolExecutor(cpu_share()) as pool:  # decoding releases Python's lock
        for start in range(0, len(split), ahead):
            yield from pool.map(functools.partial(_problem, split), range(len(split))[start : start + ahead])


def _problem(split: Photographs, index: int) -> str | None:
    try:
        split.read(index, np.empty((split.size, split.size, 3), np.uint8))
    except UserError as error:
        return str(error).rpartition(": ")[0]  # the advice is the same for all
    return None


def _judged(run: Run, found: dict[str, list[str]], what: str) -> Findings:
    """One problem of all of them, or one warning where the configuration tolerates so many."""
    if not any(found.values()):
        return Findings()
    splits = ", ".join(
        f"{len(bad):,} of {len(run.splits[name]):,} {SPLITS[name]}" for name, bad in found.items() if bad
    )
    again = "prepare --pack` again, after deleting packed/" if run.train_split.is_packed else "prepare` again"
    named = few([problem for bad in found.values() for problem in bad], "\n   ")
    text = f"{splits} photographs {what}: run the same `main.py {again}.\n   {named}"
    if all(_is_tolerated(run, name, len(bad)) for name, bad in found.items() if bad):
        return Findings(warnings=[f"(config.data.on_error=skip goes on without them) {text}"])
    return Findings(problems=[text])


def _is_tolerated(run: Run, name: str, count: int) -> bool:
    tolerated = run.config.data.tolerated
    try:
        return tolerated is not None and Unread(run.splits[name], tolerated).check(count) is None
    except UserError:
        return False


def few(texts: list[str], between: str) -> str:
    """The first of them, and how many there are more."""
    more = len(texts) - NAMED
    return between.join(texts[:NAMED] + ([f"and {more:,} more"] if more > 0 else []))
