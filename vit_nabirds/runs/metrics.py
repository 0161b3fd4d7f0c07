"""metrics.jsonl: a line for each logged step and each evaluation."""

import json
from pathlib import Path

from vit_nabirds.errors import UserError


def read_metrics(file: Path) -> list[dict]:
    """The lines of metrics.jsonl, without a last one that a crash has cut short."""
    text = file.read_text(errors="replace") if file.exists() else ""
    lines = text.splitlines(keepends=True)
    values = []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                values.append(json.loads(line))
                values[-1]["step"] + 0
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{file}, line {number} is not JSON with a step: delete that line.") from None
    return values
