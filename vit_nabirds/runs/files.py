"""Small files of a run, written whole or not at all, and checksums of what is in them."""

import contextlib
import json
import zlib
from pathlib import Path


def write_json(file: Path, value: dict) -> None:
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(file)
    except OSError:  # a full disk, where half a file would be left
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def crc32_of(content: dict) -> int:
    """Of a JSON object, whatever the order of its keys."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
