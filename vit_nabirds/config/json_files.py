"""JSON objects in files that others may have written: read whole, or refused in a line."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 2**24  # bytes; parsed, they take up to thirty times as much


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file. ValueError says what else is in it, shortly; OSError for what cannot be read."""
    # Of a pipe that nobody writes to, even opening would wait.
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST // 2**20} MiB")
    return parse_object(content)


def parse_object(text: bytes) -> dict[str, Any]:
    """The object in JSON text; ValueError says what else it is."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
