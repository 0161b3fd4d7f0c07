"""Answers of a `Classifier` on disk while they are made: a command that was stopped goes on after the last of them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from vit_nabirds.parallel.locks import lock


def version_of(file: Path) -> list:
    """What changes when a file does."""
    try:
        status = file.stat()
    except OSError:
        return [str(file.absolute())]
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


class Kept:
    """A file of JSON lines: the question, then an answer each. It stays when the command is stopped, and goes when all
    is done. `question` is what decides the answers: those to another question are thrown away, and so are those to
    photographs that have changed."""

    def __init__(self, file: Path, question: dict) -> None:
        self._file, self._question = file, json.dumps(question, sort_keys=True).encode() + b"\n"
        self._lock = lock(file, f"another process answers the same question right now ({file}): wait for its end.")

    def resume(self, photographs: list[Path]) -> tuple[int, int]:
        """How many of the photographs, the first of the list, are answered, and by how many answers.

        The last that is there may have more boxes, so it is asked for again.
        """
        self._opened = self._file.open("r+b")
        done, answers, end = [], 0, 0
        if self._opened.readline() == self._question:
            before, place = 0, self._opened.tell()
            for line in self._opened:
                try:
                    seen = json.loads(line)["seen"] if line.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):
                    seen = None
                if seen is None:
                    break
                if not done or done[-1] != seen:
                    done.append(seen)
                    before, end = answers, place
                place, answers = place + len(line), answers + 1
            done, answers = done[:-1], before
        if not done or done != [version_of(photograph) for photograph in photographs[: len(done)]]:
            done, answers, end = [], 0, 0
        os.truncate(self._file, end)
        self._opened.seek(end)
        if not end:
            self._opened.write(self._question)
        return len(done), answers

    def add(self, answer: dict) -> None:
        self._opened.write(json.dumps(answer | {"seen": version_of(Path(answer["file"]))}).encode() + b"\n")
        self._opened.flush()

    def __iter__(self) -> Iterator[dict]:
        with self._file.open("rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line)

    def remove(self) -> None:
        self._file.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._lock.close()
