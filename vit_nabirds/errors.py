"""Errors that only the user can put right, what to say of others, and how to say it whatever happens."""

import contextlib
import errno
import os
import re
import reprlib
import sys


class UserError(Exception):
    """A mistake of the user's, or trouble outside the program.

    The message says what is wrong, where (file, field or row) and what to do; it is printed without a traceback.
    """

    exit_code = 1


class ConfigError(UserError):
    """A wrong value of a configuration field or flag: exit code 2."""

    exit_code = 2


class TransientError(UserError):
    """Trouble that may be gone on another node or in an hour: exit code 74, and launch/ queues the job again."""

    exit_code = 74


_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
_STORAGE_ERRORS = "ACCES DQUOT EXIST IO ISDIR LOOP NAMETOOLONG NOENT NOSPC NOTDIR PERM ROFS STALE"
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_STORAGE = {getattr(errno, f"E{name}") for name in _STORAGE_ERRORS.split()}


# Of a node, of storage, or of memory that other jobs take too.
_TRANSIENT_ERRORS = (
    "AGAIN BUSY CONNREFUSED CONNRESET DQUOT HOSTDOWN HOSTUNREACH IO MFILE NETDOWN NETUNREACH NFILE NOLCK NOMEM NOSPC "
    "NOTCONN REMOTEIO ROFS SHUTDOWN STALE TIMEDOUT UCLEAN"
)
_TRANSIENT = {getattr(errno, f"E{name}", None) for name in _TRANSIENT_ERRORS.split()} - {None}  # some are Linux's
WORKER_LOST = "Worker process was terminated unexpectedly"  # as Grain says
# A worker of Grain; Python; XLA, of a device or of the network between devices.
_TRANSIENT_WORDS = re.compile(
    rf"{WORKER_LOST}|can't start new thread|^(Unable to initialize backend '\w+': )?"
    r"(INTERNAL|UNAVAILABLE|ABORTED|DATA_LOSS|DEADLINE_EXCEEDED|UNKNOWN: CUDA)\b"
)


def exit_code_of(error: BaseException) -> int:
    """2 for wrong usage, 74 for what may be gone on another node or in an hour, 1 for anything else."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in _TRANSIENT:
        return TransientError.exit_code
    text = str(error)
    if _number_in(text) in _TRANSIENT:
        return TransientError.exit_code
    return TransientError.exit_code if _TRANSIENT_WORDS.search(text) or any(map(text.count, _FULL[:2])) else 1


def reason_of(error: BaseException) -> str:
    """What the system says in the error of a library."""
    text = str(error)
    if number := _number_in(text):
        return os.strerror(number)
    return getattr(error, "strerror", None) or next((full for full in _FULL if full in text), text.splitlines()[0])


def _number_in(text: str) -> int:
    """The system's number of the error that a message of TensorStore is about, or 0."""
    return int((re.findall(r"os_error_code='(\d{1,5})'", text) or [0])[0])


def remedy_of(error: OSError) -> str:
    """The first words of the advice after a failed write."""
    return "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Put that right"


def message_of(error: BaseException) -> str | None:
    """One line for the user; None for a fault of the program, which needs its traceback."""
    message = _message_of(error)
    return message and visible(message if len(message) <= LONGEST else f"{message[:LONGEST]} …")


def _message_of(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("vit_nabirds"):
        return f"the package {error.name!r} is not installed in this Python environment: see BUILD.md"
    if isinstance(error, BrokenPipeError):  # no success: what was to follow has not been done
        return f"nobody reads the output any more, or another process of this program has ended ({error})"
    if isinstance(error, RuntimeError) and WORKER_LOST in str(error):
        return (
            "the processes that read photographs were killed or hung, and so were those that replaced them: is there "
            "too little memory (use fewer, config.data.workers), or does the storage hang? The same command goes on "
            "from the last checkpoint."
        )
    if isinstance(error, RuntimeError | ValueError) and "Out of memory while trying to allocate" in str(error):
        return (
            f"a device's memory is full ({str(error).splitlines()[0]}). For a training use --config.microbatch=-1, "
            '--config.remat=blocks, --config.mesh.fsdp=-1 or a smaller batch (docs/gpu.md, "What does not fit"), and '
            "see with nvidia-smi whether another program uses the GPU."
        )
    if full := [text for text in _FULL if text in str(error)]:  # from any library that writes
        again = "run the same command again (a training goes on from its last checkpoint)"
        return f"{full[0]}: make room, and {again}. ({error})"
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return f"{error}: use another folder, or get the right to use this one"
    return str(error) if isinstance(error, OSError) and error.errno in _STORAGE else None


PROXY = "rich_proxied_file"  # what stderr has while terminal.py shows something


def say(line: str) -> None:
    """Write lines to stderr, from any thread or signal handler. A reader that has gone must not stop the work."""
    text = visible(line, keep="\n\t") + "\n"
    with contextlib.suppress(OSError):
        if hasattr(sys.stderr, PROXY):  # above what terminal.py shows
            sys.stderr.write(text)
        else:
            os.write(2, text.encode())


LONGEST = 4000  # characters of a message


def visible(text: str, keep: str = "") -> str:
    """The text as a terminal may be given it: "\\x1b" for a control, a mark of direction and the like."""
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def shown(value: object, most: int = 200) -> str:
    """What others have written, as `repr` shows it: at most so many characters, none of them invisible."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    try:
        return _shortened(visible(short.repr(value)), most)
    except ValueError:  # Python does not write a number of more than 4,300 digits
        return "a number of thousands of digits"


def quoted(text: object, most: int = 200) -> str:
    """The same of text, as it is."""
    return _shortened(visible(str(text)[: most + 1]), most)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def without_secrets(text: str) -> str:
    """Without user and password in addresses, and what looks like a key or token in them."""
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1…@", text)
    name = r"(?:key|token|secret|password|passwd|auth\w*|credentials?|sig|signature)"
    text = re.sub(rf"(?i)(--?[\w-]*{name}\s+)[^\s&,;]+", r"\1…", text)  # an option and its value
    return re.sub(rf"(?i)({name}[\"']?\s*[=:]\s*)((?:bearer|basic|token)\s+)?[^\s&,;]+", r"\1…", text)
