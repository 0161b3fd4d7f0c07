"""Small files of a run, written whole or not at all."""

import json
from pathlib import Path


def write_json(file: Path, value: dict) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(file)
