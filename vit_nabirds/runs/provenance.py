"""What a run was made with: WORKDIR/starts.jsonl has a line for each start of it."""

import importlib.metadata
import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vit_nabirds.errors import without_secrets
from vit_nabirds.parallel.launchers import PACKAGES

log = logging.getLogger("vit_nabirds")


def provenance() -> dict[str, str]:
    """Command line, git revision and versions, without secrets: the environment is left out."""
    versions = {name: importlib.metadata.version(name) for name in ("vit-nabirds", *PACKAGES) if _is_installed(name)}
    return {
        "command": without_secrets(shlex.join(sys.argv)),
        "revision": _revision(Path(__file__).parent),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return False


def _revision(folder: Path) -> str:
    """Of the checkout that a folder is in, with '-dirty' after changes; '' where there is none."""
    return _git(folder, "ls-files", Path(__file__).name) and _git(folder, "describe", "--always", "--dirty")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def add_start(workdir: Path, values: dict) -> None:
    """A line of starts.jsonl."""
    try:
        with (workdir / "starts.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
    except OSError as error:
        log.warning("%s could not be written (%s)", workdir / "starts.jsonl", error.strerror)


def as_table(rows: list[tuple], head: tuple[str, ...]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: object) -> str:
    """Nothing in it is Markdown or HTML."""
    text = " ".join(str(value).split())
    for character, written in {"&": "&amp;", "<": "&lt;", "|": "&#124;", "*": "&#42;", "`": "&#96;"}.items():
        text = text.replace(character, written)
    return text
