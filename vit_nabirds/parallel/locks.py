"""Locks on files: one process at a time trains in a workdir, or packs a folder."""

import fcntl
from pathlib import Path
from typing import TextIO

from vit_nabirds.errors import UserError


def lock(file: Path, otherwise: str) -> TextIO:
    """An open file that keeps other processes out, where its file system has locks; else UserError(otherwise)."""
    opened = file.open("a")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(otherwise) from None
    except OSError:  # without locks
        pass
    return opened
