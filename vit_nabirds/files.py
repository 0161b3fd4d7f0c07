"""Files that are written whole or not at all, and checksums of JSON."""

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


@contextlib.contextmanager
def written_whole(file: Path, name: str = "") -> Iterator[Path]:
    """Where to write what becomes `file` at the end, under a name beside it (default: its own and PARTIAL). A full disk
    leaves nothing; a killed process leaves that name."""
    partial = file.with_name(name or file.name + PARTIAL)
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(file: Path, value: dict) -> None:
    with written_whole(file) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def crc32_of(content: dict) -> int:
    """Of a JSON object, whatever the order of its keys."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
