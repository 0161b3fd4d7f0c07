"""Locks on files, so that one process at a time trains in a workdir or packs a folder."""

import fcntl
import logging
from pathlib import Path
from typing import TextIO

from vit_nabirds.errors import UserError

log = logging.getLogger("vit_nabirds")


def lock(file: Path, message: str) -> TextIO:
    """Lock the file until it is closed; UserError(message) if another process has locked it."""
    opened = file.open("a")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(message) from None
    except OSError as error:  # a file system without locks
        log.info("%s is not locked (%s): nothing keeps another process out", file, error.strerror)
    return opened
