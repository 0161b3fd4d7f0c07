"""Which checkpoint of a run is selected, and by which figure: a small checked file beside the checkpoints."""

import dataclasses
import json
import logging
import re
from pathlib import Path

from vit_nabirds.config import Config
from vit_nabirds.config.json_files import read_object
from vit_nabirds.files import crc32_of, write_json

log = logging.getLogger("vit_nabirds")

PREDICTIONS = "predictions.parquet"  # what the selected checkpoint says of each test photograph


def metric_of(config: Config) -> str | None:
    """The figure that selects; None without validation photographs: nothing is selected, the last checkpoint counts."""
    return f"val/{config.evaluate.select}" if config.data.validation else None


# What is needed of an evaluation, and of the final scores.
EVALUATION = {"loss", "accuracy", "mean_class_accuracy"}
TEST = {"loss", "accuracy", "accuracy_interval", "top5_accuracy", "mean_class_accuracy", "examples"}


def _by_step(content: object, needed: set[str]) -> dict[int, dict]:
    """Figures by step, as they are written: numbers, and intervals of two. ValueError for anything else."""
    if not isinstance(content, dict) or not all(re.fullmatch("[0-9]{1,15}", step) for step in content):
        raise ValueError("its figures are not by step")
    for figures in content.values():
        check_figures(figures, needed)
    return {int(step): figures for step, figures in content.items()}


def check_figures(figures: object, needed: set[str]) -> None:
    """ValueError unless they are those of one evaluation: numbers, and intervals of two, at least the needed ones."""
    if not isinstance(figures, dict) or not figures.keys() >= needed:
        raise ValueError("it lacks figures")
    for name, value in figures.items():
        values = value if name.endswith("_interval") else [value]
        if not isinstance(values, list) or len(values) != 1 + name.endswith("_interval"):
            raise ValueError("an interval of it has not two ends")
        if not all(type(x) in (int, float) and abs(x) < 1e300 for x in values):
            raise ValueError("a figure of it is no number")


@dataclasses.dataclass
class Selection:
    """The evaluations of a run by step, the final scores on the test photographs by step, and the checkpoints whose
    evaluations are lost: any of them may be the best, so they are kept, and scored again at the end."""

    file: Path
    metric: str | None
    evaluations: dict[int, dict[str, float]]
    tests: dict[int, dict]
    unknown: list[int]

    @classmethod
    def read(cls, workdir: Path, checkpoints: list[int], metric: str | None) -> "Selection":
        """Of a run that has checkpoints of these steps. Without the file, or with a damaged one, all are unknown."""
        file = workdir / "selection.json"
        try:
            content = read_object(file)
            if content.pop("crc32", None) != crc32_of(content):
                raise ValueError("wrong checksum")
            prefix = "val" if metric else "test"
            evaluations = _by_step(content.get("evaluations", {}), {f"{prefix}/{name}" for name in EVALUATION})
            tests = _by_step(content.get("tests", {}), TEST)
            if not (workdir / PREDICTIONS).exists():  # it is written with them
                tests = {}
            if not isinstance(unknown := content.get("unknown"), list):
                raise ValueError("it does not say which steps are unknown")
            return cls(file, metric, evaluations, tests, [step for step in checkpoints if step in unknown])
        except FileNotFoundError:
            problem = "is missing"
        except ValueError as error:
            problem = f"is damaged ({error})"
        if checkpoints and metric:
            steps = ", ".join(map(str, checkpoints))
            log.warning("%s %s: any checkpoint (of step %s) may be the best, all are kept", file, problem, steps)
        return cls(file, metric, {}, {}, list(checkpoints) if metric else [])

    def ask_again(self, steps: list[int]) -> None:
        """Of these steps, which have been evaluated, some evaluations may not have been written: storage was full."""
        if self.metric:
            self.unknown += [step for step in steps if step not in self.evaluations and step not in self.unknown]

    @property
    def checksum(self) -> int:
        """Of all that decides which checkpoint is selected."""
        content = {"evaluations": self.evaluations, "tests": self.tests, "unknown": self.unknown}
        return crc32_of(json.loads(json.dumps(content)))

    def forget_after(self, step: int) -> None:
        """Drop the evaluations of later steps, which the run trains again."""
        self.evaluations = {s: figures for s, figures in self.evaluations.items() if s <= step}
        self.tests = {s: figures for s, figures in self.tests.items() if s <= step}

    def best(self, steps: list[int]) -> int | None:
        """Of these steps the one with the best `metric`; without a metric the last.

        Few validation photographs make equal accuracies likely: of those the smallest loss counts, then the first step.
        """
        if self.metric is None:
            return max(steps, default=None)
        known = sorted(step for step in steps if self.metric in self.evaluations.get(step, {}))
        sign = -1 if self.metric.endswith("loss") else 1
        figures = {step: self.evaluations[step] for step in known}
        return max(
            known, key=lambda step: (sign * figures[step][self.metric], -figures[step]["val/loss"]), default=None
        )

    @property
    def evaluations_since_best(self) -> int:
        best = self.best(list(self.evaluations))
        return 0 if best is None else sum(step > best for step in self.evaluations)

    def keep(self, checkpoints: list[int]) -> list[int]:
        """The steps whose checkpoints must not be deleted: the best, and those that may be better."""
        best = self.best(checkpoints)
        return [*self.unknown, *([] if best is None else [best])]

    def write(self) -> None:
        content = {name: getattr(self, name) for name in ("metric", "evaluations", "tests", "unknown")}
        content = json.loads(json.dumps(content))  # steps become text
        write_json(self.file, content | {"crc32": crc32_of(content)})

    def results(self, selected: int, last: int) -> dict:
        """results.json of a finished training."""
        found = {"step": selected, "metric": self.metric, "value": None}
        if self.metric:
            found["value"] = self.evaluations[selected][self.metric]
        else:
            found["why"] = "the last checkpoint: with data.validation=0 nothing is selected"
        return {"selected": found, "test": self.tests[selected], "last": {"step": last, "test": self.tests[last]}}
