"""metrics.jsonl: a line for each logged step and each evaluation. It is a log: no resume needs it."""

import json
import logging
from pathlib import Path

from vit_nabirds.config.json_files import parse_object
from vit_nabirds.files import written_whole

log = logging.getLogger("vit_nabirds")


class MetricsFile:
    """Continues a metrics.jsonl after step `start`: later lines are trained again, damaged ones go to metrics.damaged.

    Lines that a full disk does not take are kept until it does.
    """

    def __init__(self, file: Path, start: int) -> None:
        lines, damaged = split_metrics(file)
        if damaged:
            aside = file.with_suffix(".damaged")
            with aside.open("ab") as unread:
                unread.writelines(line + b"\n" for line in damaged)
            log.warning("%s: %d line(s) could not be read and are in %s now", file, len(damaged), aside.name)
        self.earlier = lines  # also those that are trained again
        with written_whole(file) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))
        self._file, self._unwritten = file.open("ab", buffering=0), b""

    def write(self, line: dict) -> None:
        self._write(json.dumps(line).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        had_room, self._unwritten = not self._unwritten, self._unwritten + line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if had_room:
                log.warning("%s cannot be written (%s): its lines wait", self._file.name, error.strerror)

    def close(self) -> None:
        self._write(b"")
        if self._unwritten:
            log.warning("%d lines of %s are lost", self._unwritten.count(b"\n"), self._file.name)
        self._file.close()


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl that can be read; a crash may have cut the last one short."""
    return split_metrics(file)[0]


def split_metrics(file: Path) -> tuple[list[dict], list[bytes]]:
    """What can be read of its whole lines, and those that cannot be read."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    parsed = [_parsed(line) for line in lines]
    values = [value for value in parsed if value is not None]
    return values, [line for line, value in zip(lines, parsed, strict=True) if value is None]


def _parsed(line: bytes) -> dict | None:
    """An object with a step and numbers, or lists of them; None for anything else."""
    try:
        value = parse_object(line)
    except ValueError:
        return None
    is_step = type(value.get("step")) is int and value["step"] >= 0
    numbers = [x for entry in value.values() for x in (entry if isinstance(entry, list) else [entry])]
    return value if is_step and all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers) else None
