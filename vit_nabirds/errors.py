"""Errors that only the user can put right, and what to say of others."""

import errno


class UserError(Exception):
    """A mistake of the user's, or trouble outside the program.

    The message says what is wrong, where (file, field or row) and what to do; it is printed without a traceback.
    """

    exit_code = 1


class ConfigError(UserError):
    """A wrong value of a configuration field or flag: exit code 2."""

    exit_code = 2


_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
_STORAGE = {
    getattr(errno, f"E{name}") for name in "ACCES DQUOT EXIST IO ISDIR NOENT NOSPC NOTDIR PERM ROFS STALE".split()
}


def remedy_of(error: OSError) -> str:
    """The first words of the advice after a failed write."""
    return "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Put that right"


def message_of(error: BaseException) -> str | None:
    """One line for the user; None for a fault of the program, which needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("vit_nabirds"):
        return f"the package {error.name!r} is not installed in this Python environment: see BUILD.md"
    if full := [text for text in _FULL if text in str(error)]:  # from any library that writes
        return f"{full[0]}: make room, and run the same command again to go on from the last checkpoint. ({error})"
    return str(error) if isinstance(error, OSError) and error.errno in _STORAGE else None
