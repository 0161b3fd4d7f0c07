"""How to write a command so that it works where this one was typed."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """What stands before the command's name: 'python main.py', '.venv/bin/python main.py' or 'vit-nabirds'."""
    script, ours = Path(sys.argv[0]), Path(__file__).parents[2] / "main.py"
    if script.suffix != ".py":
        return _typed(script)
    if script.name != ours.name and ours.exists():  # a notebook's kernel, or another program that calls this one
        script = ours
    return f"{_typed(Path(sys.executable))} {relative(script)}"


def main_program() -> list[str]:
    """The same program, to be started as another process: main.py of the checkout, or what pip has installed."""
    main = Path(__file__).parents[2] / "main.py"
    return [sys.executable, str(main)] if main.exists() else [str(Path(sys.executable).parent / "vit-nabirds")]


def tool(name: str) -> str:
    """A program of this Python environment, like tensorboard."""
    return _typed(Path(sys.executable).parent / name)


def _typed(path: Path) -> str:
    """The bare name where the shell finds this very file, else a path to it."""
    for name in (path.name, *(["python"] if path.name.startswith("python") else [])):
        if shutil.which(name) == str(path):
            return name
    return relative(path)


def relative(path: Path) -> str:
    """The shortest path from here, quoted for the shell."""
    short = os.path.relpath(path)
    return shlex.quote(str(path.absolute()) if short.startswith("..") else short)
