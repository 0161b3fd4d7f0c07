"""Which run of a tracker a workdir is, so that a run which is stopped and resumed stays one: WORKDIR/trackers.json."""

import logging
import threading

from vit_nabirds.config.json_files import read_object
from vit_nabirds.errors import quoted
from vit_nabirds.files import write_json
from vit_nabirds.runs.trackers import RunInfo

log = logging.getLogger("vit_nabirds")


class Identity:
    """For each tracker with a server: the id of its run, and up to which step it has each figure.

    Steps that are trained again give the same figures, so they are not reported again. A run that goes back to an
    earlier step with another configuration gives others: it becomes a new run, and the curves of the old one stay.
    """

    def __init__(self, info: RunInfo, earlier: list[dict]) -> None:
        """`earlier` are the lines of metrics.jsonl, also those that are trained again."""
        self._file, self._lock, self._changes = info.workdir / "trackers.json", threading.Lock(), info.changes
        self._runs = self._read()
        for name, run in list(self._runs.items()):
            for line in earlier:
                run["until"] |= {x: max(line["step"], run["until"].get(x, 0)) for x in line if "/" in x}
            if run["changes"] != info.changes and max(run["until"].values(), default=0) > info.start:
                log.info(
                    "the run goes on with another configuration from step %d: in %s as a new run", info.start, name
                )
                del self._runs[name]
        if self._runs:
            self._write()

    def id_of(self, name: str) -> str | None:
        """Of the run in the tracker of this name; None: there is none yet."""
        return self._runs[name]["id"] if name in self._runs else None

    def keep(self, name: str, id: str) -> None:
        """Of a new run."""
        with self._lock:
            self._runs[name] = {"id": id, "changes": self._changes, "until": {}}
            self._write()

    def unreported(self, name: str, step: int, values: dict[str, float]) -> dict[str, float]:
        """Those figures that the tracker does not have of this step."""
        until = self._runs[name]["until"] if name in self._runs else {}
        return {x: value for x, value in values.items() if step > until.get(x, -1)}

    def _read(self) -> dict[str, dict]:
        try:
            runs = read_object(self._file)
            wrong = [name for name, run in runs.items() if not _is_run(run)]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            runs, wrong = {}, [quoted(error)]
        if wrong:
            log.warning("%s is of no use (%s): the trackers get a new run", self._file, quoted(wrong[0]))
        return {} if wrong else runs

    def _write(self) -> None:
        try:
            write_json(self._file, self._runs)
        except OSError as error:
            log.warning(
                "%s could not be written (%s): after a stop the trackers get a new run", self._file, error.strerror
            )


def _is_run(run: object) -> bool:
    """Of this file, as this program writes it."""
    return (
        isinstance(run, dict)
        and run.keys() == {"id", "changes", "until"}
        and isinstance(run["id"], str)
        and type(run["changes"]) is int
        and isinstance(run["until"], dict)
        and all(type(step) is int for step in run["until"].values())
    )
