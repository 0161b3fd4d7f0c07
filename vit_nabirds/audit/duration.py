"""How long a training takes, and for how many jobs that is."""

import math
import re
import statistics
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from vit_nabirds.audit.findings import Findings, counted
from vit_nabirds.errors import ConfigError
from vit_nabirds.evaluation.views import COUNTS
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.quantities import time_in_words
from vit_nabirds.training.run import Run

START = 60  # seconds to the first step: a round guess; later starts find what the first has compiled
RECENT = 20  # lines of metrics.jsonl
FORWARD = 1 / 3  # of a training step's work is done to score a photograph


class Speed(NamedTuple):
    """Photographs a second in training, and how that is known."""

    images: float
    source: str
    is_bound: bool = False  # no real run is faster


def seconds_of(text: str) -> float:
    """A time limit as sbatch takes it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; infinity for none."""
    if text.upper() in ("0", "UNLIMITED", "INFINITE"):
        return math.inf
    found = re.fullmatch(r"(?:(\d{1,5})-(?=\d))?(\d{1,7})(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if not found:
        raise ConfigError(
            f"--time is {text!r}: write it as for sbatch, like 03:00:00, 90 (minutes) or 2-12 (days-hours)."
        )
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part]
    if days or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


def speed_of(given: float | None, workdir: Path, most: float | None) -> Speed | None:
    """As the user says, as the run in the workdir was last, or the bound of described GPUs."""
    if given is not None:
        if not 0 < given < math.inf:
            raise ConfigError(f"--images_per_second is {given}: give a number above 0.")
        return Speed(given, "as given")
    lines = [line.get("train/images_per_second", 0) for line in read_metrics(workdir / "metrics.jsonl")]
    if seen := [number for number in lines if isinstance(number, int | float) and number > 0][-RECENT:]:
        return Speed(statistics.median(seen), f"as the run in {workdir} was last")
    return Speed(most, "the most that these GPUs can do: a real run takes longer", True) if most else None


def of_duration(run: Run, speed: Speed | None, limit: float | None, leave: float, requeues: bool) -> Findings:
    """What the rest of the run takes, and how often it has to be resumed where a job has `limit` seconds and is stopped
    `leave` seconds before their end."""
    if limit is not None and limit <= START + leave:
        return Findings(
            problems=[
                f"a job of {about_minutes(limit)} trains nothing: it is stopped {leave:g} s before its end to save, "
                f"and needs {START} s or so to start. Give it more --time."
            ]
        )
    if not run.goes_on:
        return Findings()
    if speed is None:
        return Findings(["duration     not known: say how fast it is, with --images_per_second=N"])
    steps = run.plan.total_steps - run.start
    evaluations = ends(run.plan.evaluate_every, run.start, run.plan.total_steps)
    if run.validation_split:  # and at the end the selected checkpoint and the last
        scored = evaluations * len(run.validation_split) + 2 * len(run.test_split)
    else:
        scored = evaluations * len(run.test_split)
    scored *= COUNTS[run.config.evaluate.views]
    seconds = START + (steps * run.config.batch_size + FORWARD * scored) / speed.images
    about = "at least" if speed.is_bound else "about"
    evaluated = f" and {counted(evaluations, 'evaluation')}"
    rate = f"{speed.images:,.0f}" if speed.images >= 100 else f"{speed.images:.3g}"
    lines = [
        f"duration     {about} {about_minutes(seconds)} for {counted(steps, 'step')}{evaluated}",
        f"             at {rate} images/s, {speed.source}",
    ]
    if limit is None or limit == math.inf:
        return Findings(lines)
    jobs = math.ceil((seconds - START) / (limit - leave - START))
    if jobs == 1:
        return Findings([*lines, f"             in one job of {about_minutes(limit)}"])
    often = counted(jobs - 1, "time")
    lines.append(f"             {about} {jobs:,} jobs of {about_minutes(limit)}: it is resumed {often}")
    by_hand = f"the run needs {about} {jobs:,} jobs, and --no-requeue leaves it to you to submit them again."
    return Findings(lines, warnings=[] if requeues else [by_hand])


def ends(period: Fraction, start: int, last: int) -> int:
    """How often a period, in steps, ends after the step `start` up to the last one, which counts always."""
    return (last - 1) // period - start // period + 1


def about_minutes(seconds: float) -> str:
    """Without seconds where there are minutes: they would say more than is known."""
    return f"{seconds:.0f} s" if seconds < 90 else time_in_words(60 * round(seconds / 60))
