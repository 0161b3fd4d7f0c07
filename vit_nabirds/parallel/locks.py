"""Locks on files, so that one process at a time trains in a workdir or packs a folder."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Self, TextIO

from vit_nabirds.errors import UserError

HEARTBEAT = 20.0  # seconds between two signs of life of an owner
TAKING_OVER = 1.0  # seconds in which others who take over show themselves
SILENCE = 120.0  # seconds without one after which its lock counts for nothing


def lock(file: Path, message: str) -> "TextIO | Owner":
    """Lock the file until it is closed; UserError(message) if another process has locked it.

    Where the file system has no locks, a file beside it names the owner.
    """
    opened = file.open("a")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise UserError(message) from None
    except OSError:
        opened.close()
        return Owner(file.with_name(f"{file.name}.owner"), message)
    return opened


class Owner:
    """A file that names the process that has it, which touches it again and again as a sign of life.

    UserError(message) if another process has it. One that is dead, or silent for long, has lost it.
    """

    def __init__(self, file: Path, message: str) -> None:
        self._file, self._closing = file, threading.Event()
        self._mine = mine = json.dumps(
            {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
        )
        try:
            self._create(mine)
        except FileExistsError:
            if (owner := _alive(file)) is not None:
                raise UserError(f"{message} (It is process {owner.get('pid')} on {owner.get('host')}.)") from None
            file.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                self._create(mine)
            time.sleep(TAKING_OVER)  # another may have found the old owner dead in the same moment
            if not file.exists() or file.read_text() != mine:
                raise UserError(message) from None
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _create(self, content: str) -> None:
        self._opened = self._file.open("x")
        self._opened.write(content)
        self._opened.flush()

    def _live(self) -> None:
        while not self._closing.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if self._is_mine():  # or another has taken this process for dead
                    os.utime(self._file)

    def _is_mine(self) -> bool:
        return self._file.read_text() == self._mine

    def fileno(self) -> int:
        return self._opened.fileno()

    def close(self) -> None:
        self._closing.set()
        self._opened.close()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._file.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _alive(file: Path) -> dict | None:
    """What the file says of its owner; None if that one is dead or silent."""
    try:
        written = file.stat().st_mtime
        owner = json.loads(file.read_text())
        if owner["host"] and owner.get("machine") == _machine():
            return owner if _started(owner["pid"]) == owner["started"] else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # in the moment between its creation and its first words, or damaged
        owner = {}
    return owner if _now(file.parent) - written < SILENCE else None


def _machine() -> str | None:
    """What is one for processes that see each other's numbers: two containers of a machine do not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine started, by its kernel; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _now(folder: Path) -> float:
    """By the clock of the storage, which is not that of this machine."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)
