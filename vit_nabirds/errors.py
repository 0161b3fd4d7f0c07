"""The exception that a user's mistake raises, and what to tell of others."""

import errno

_OF_DISKS = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "EDQUOT",
        "EEXIST",
        "EIO",
        "EISDIR",
        "ENOENT",
        "ENOSPC",
        "ENOTDIR",
        "EPERM",
        "EROFS",
        "ESTALE",
    )
}


class UserError(Exception):
    """Something only the user can put right.

    The message says what is wrong, where (file, field or row) and what to do about it; `main.py` prints it
    without a traceback and exits with 1.
    """


def remedy_of(error: OSError) -> str:
    """How a sentence of advice begins, after what a write raised."""
    return "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Put that right"


def message_of(error: BaseException) -> str | None:
    """What to tell the user of an error, in a line; None: it is a fault of the program, and its traceback is needed."""
    if isinstance(error, UserError):
        return str(error)
    full = [text for text in ("No space left on device", "Disk quota exceeded", "File too large") if text in str(error)]
    if full:  # whichever of the libraries that write says so
        return f"{full[0]}: make room, and run the same command again to go on from the last checkpoint. ({error})"
    return str(error) if isinstance(error, OSError) and error.errno in _OF_DISKS else None
