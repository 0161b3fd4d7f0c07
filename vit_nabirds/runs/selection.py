"""Which checkpoint of a run is the best, and by which figure: a small checked file beside the checkpoints."""

import dataclasses
import json
import logging
from pathlib import Path

from vit_nabirds.runs.files import crc32_of, write_json

log = logging.getLogger("vit_nabirds")

METRIC = "test/accuracy"  # higher is better


@dataclasses.dataclass
class Selection:
    """The evaluations of a run by step, and the checkpoints whose evaluations are lost: any of them may be the best."""

    file: Path
    evaluations: dict[int, dict[str, float]]
    unknown: list[int]

    @classmethod
    def read(cls, workdir: Path, checkpoints: list[int]) -> "Selection":
        """Of a run that has checkpoints of these steps. Without the file, or with a damaged one, all are unknown."""
        file = workdir / "selection.json"
        try:
            content = json.loads(file.read_text())
            if content.pop("crc32") != crc32_of(content):
                raise ValueError("wrong checksum")
            evaluations = {int(step): metrics for step, metrics in content["evaluations"].items()}
            return cls(file, evaluations, [step for step in content["unknown"] if step in checkpoints])
        except FileNotFoundError:
            problem = "is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"is damaged ({error})"
        if checkpoints:
            steps = ", ".join(map(str, checkpoints))
            log.warning("%s %s: any checkpoint (of step %s) may be the best, all are kept", file, problem, steps)
        return cls(file, {}, list(checkpoints))

    def forget_after(self, step: int) -> None:
        """Drop the evaluations of later steps, which the run trains again."""
        self.evaluations = {s: metrics for s, metrics in self.evaluations.items() if s <= step}

    def best(self, checkpoints: list[int]) -> int | None:
        """The step with the highest METRIC among those that have a checkpoint; the earliest of equals."""
        known = sorted(set(self.evaluations) & set(checkpoints))
        return max(known, key=lambda step: self.evaluations[step][METRIC], default=None)

    def keep(self, checkpoints: list[int]) -> list[int]:
        """The steps whose checkpoints must not be deleted: the best, and those that may be better."""
        best = self.best(checkpoints)
        return [*self.unknown, *([] if best is None else [best])]

    def write(self) -> None:
        content = {"metric": METRIC, "evaluations": self.evaluations, "unknown": self.unknown}
        content = json.loads(json.dumps(content))  # steps become text
        write_json(self.file, content | {"crc32": crc32_of(content)})
