"""metrics.jsonl: a line for each logged step and each evaluation. It is a log: no resume needs it."""

from pathlib import Path

from vit_nabirds.config.json_files import parse_object


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
