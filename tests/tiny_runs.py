"""Tiny trainings in this process, and what can happen in the middle of one."""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from vit_nabirds.config import Config
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.runs.checkpoints import Metadata, existing
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.training.run import Run, prepare_run
from vit_nabirds.training.train import train as train_run

FINISHED, STOPPED = 0, 75


def train(config: ConfigDict, workdir: Path, **options) -> int:
    return train_run(Config.read(config), workdir, ProcessGroup(), **options)


def prepared_run(config: ConfigDict, workdir: Path) -> Run:
    return prepare_run(Config.read(config), workdir, ProcessGroup())


def with_own_mounts(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a bash script that may mount what only it sees. The test is skipped where that is not allowed."""
    tests = Path(__file__).parent
    path = {"PYTHONPATH": f"{tests}:{tests.parent}"}
    try:
        command = ["unshare", "-m", "bash", "-c", script, "bash", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | path)
    except FileNotFoundError:
        pytest.skip("needs unshare of util-linux")
    if done.returncode and any(line.startswith(("unshare:", "mount:")) for line in done.stderr.splitlines()):
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    return done


@contextlib.contextmanager
def at(text: str, act: Callable[[], object]) -> Iterator[None]:
    """Act once, when a line with this text is logged. What `act` raises ends the training, as a crash would.

    With log_every=1, step k is logged after step k + 1 was dispatched, and a request to stop at that moment makes step
    k + 2 the last one. A step that is saved or evaluated is logged before the next one.
    """
    log, done = logging.getLogger("vit_nabirds"), []

    def watch(record: logging.LogRecord) -> bool:
        if not done and text in record.getMessage():
            done.append(True)
            act()
        return True

    level = log.level
    log.addFilter(watch)
    log.setLevel(logging.INFO)
    try:
        yield
        assert done, f"{text!r} was never logged"
    finally:
        log.removeFilter(watch)
        log.setLevel(level)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("the machine died")


def losses(workdir: Path) -> dict[int, float]:
    """The training loss by step; no step twice."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
    by_step = {line["step"]: line["train/loss"] for line in lines}
    assert len(by_step) == len(lines)
    return by_step


def read_evaluations(file: Path) -> dict[int, dict]:
    """The figures of each evaluation in metrics.jsonl by step."""
    evaluations = {}
    for line in read_metrics(file):
        if {"val/accuracy", "test/accuracy"} & line.keys():
            figures = {name: value for name, value in line.items() if "/" in name}
            evaluations[line["step"]] = evaluations.get(line["step"], {}) | figures
    return evaluations


def steps_of(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return existing(workdir / "checkpoints")[0]


def metadata_of(workdir: Path) -> Metadata:
    """Of the newest checkpoint."""
    return existing(workdir / "checkpoints")[1]


def arrays_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by part and path, read with Orbax alone."""
    parts = ocp.load_checkpointables(workdir / "checkpoints" / str(step))
    parts = {part: parts[part] for part in ("params", "training", "ema") if part in parts}
    return {f"{part}/{path}": np.asarray(x) for part, arrays in parts.items() for path, x in arrays.items()}


def hold() -> None:
    """Stay in native code, which signals do not interrupt, as in a compilation, until standard input is closed."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros are an unlocked mutex
    libc.pthread_mutex_lock(mutex)

    def release() -> None:
        sys.stdin.read()
        libc.pthread_mutex_unlock(mutex)

    threading.Thread(target=release, daemon=True).start()
    print("held", flush=True)
    libc.pthread_mutex_lock(mutex)
