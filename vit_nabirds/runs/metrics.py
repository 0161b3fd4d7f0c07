"""metrics.jsonl: a line for each logged step and each evaluation. It is a log: no resume needs it."""

import json
import math
from pathlib import Path


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl that can be read; a crash may have cut the last one short."""
    return split_metrics(file)[0]


def split_metrics(file: Path) -> tuple[list[dict], list[bytes]]:
    """What can be read of its whole lines, and those that cannot be read."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    parsed = [_parsed(line) for line in lines]
    values = [value for value in parsed if value is not None]
    return values, [line for line, value in zip(lines, parsed, strict=True) if value is None]


def _parsed(line: bytes) -> dict | None:
    """An object with a step and numbers; None for anything else."""
    try:
        value = json.loads(line)
        if type(value["step"]) is not int or value["step"] < 0:
            return None
        numbers = [x for name, x in value.items() if "/" in name or name in ("epoch", "time")]
        return value if all(type(x) in (int, float) and math.isfinite(x) for x in numbers) else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
