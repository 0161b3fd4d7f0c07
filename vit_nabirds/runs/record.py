"""run.json: what a run trained on, and where, with what and by which command it was started. No resume needs it."""

import dataclasses
import importlib.metadata
import logging
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_nabirds.config.json_files import read_object
from vit_nabirds.errors import without_secrets
from vit_nabirds.files import write_json
from vit_nabirds.parallel.join import PACKAGES

log = logging.getLogger("vit_nabirds")

RECORD = "run.json"
MOST_STARTS = 100  # that are kept: the first, and the newest of the others


@dataclasses.dataclass(frozen=True)
class Start:
    step: int
    time: float  # seconds since 1970
    command: str  # as it was typed, without secrets; empty where the training was called from Python
    devices: str  # like "8 x NVIDIA H100 80GB HBM3"
    processes: int
    versions: dict[str, str]
    revision: str  # of the program's git checkout; empty without one


@dataclasses.dataclass(frozen=True)
class Record:
    total_steps: int
    classes: int
    photographs: dict[str, int]  # by split
    parameters: int
    trained: int  # of the parameters
    fingerprint: str  # of the photographs
    starts: list[Start]


def record_start(workdir: Path, step: int, devices: list, processes: int, facts: dict) -> Start:
    """Add a start at this step to run.json, if it can be written. `facts`: all fields of a Record but `starts`."""
    start = Start(
        step, round(time.time(), 3), _command(), _in_words(devices), processes, _versions(), _revision()
    )  # fmt: skip
    earlier = found.starts if (found := read_record(workdir)) else []
    starts = [*earlier[:1], *earlier[1:][2 - MOST_STARTS :], start]
    try:
        write_json(workdir / RECORD, dataclasses.asdict(Record(**facts, starts=starts)))
    except OSError as error:
        log.warning("%s could not be written (%s)", workdir / RECORD, error.strerror)
    return start


def read_record(workdir: Path) -> Record | None:
    """None for a run of an earlier version, and for a file that is not what `record_start` writes."""
    try:
        fields = read_object(workdir / RECORD)
        starts = [_checked(Start, start) for start in fields.pop("starts")]
        return _checked(Record, fields | {"starts": starts}) if starts else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _checked(kind: type, fields: dict) -> Any:
    """A dataclass of JSON. ValueError for a value that this program does not write."""
    if wrong := [name for name, value in fields.items() if not _CHECKS[name](value)]:
        raise ValueError(f"{wrong[0]} is not what this program writes")
    return kind(**fields)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**15


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 100_000


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "processes", "total_steps", "classes", "parameters", "trained"), _is_count),
    **dict.fromkeys(("command", "devices", "revision", "fingerprint"), _is_text),
    "time": lambda value: type(value) in (int, float) and 0 <= value < 1e11,
    "versions": lambda value: all(map(_is_text, value.values())),
    "photographs": lambda value: all(map(_is_count, value.values())),
    "starts": lambda value: True,  # checked one by one
}


def _command() -> str:
    """The command line, if it is one of this program's: not that of a notebook or a test."""
    is_ours = Path(sys.argv[0]).name in ("main.py", "vit-nabirds")
    python = ["python"] if sys.argv[0].endswith(".py") else []
    return without_secrets(shlex.join([*python, *sys.argv])) if is_ours else ""


def _in_words(devices: list) -> str:
    """Like '8 x NVIDIA H100 80GB HBM3'."""
    kind = f"CPU ({_processor()})" if devices[0].platform == "cpu" else devices[0].device_kind
    return f"{len(devices)} x {kind}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | packages


def _revision() -> str:
    """Like '1a2b3c4d5e6f', with '-dirty' behind it where files have changed since."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed, perhaps below another project's checkout
        return ""
    command = ["git", "--no-optional-locks", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
