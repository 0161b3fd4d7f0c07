"""A whole training: its speed beside the bare step's, its steps while checkpoints are written, start and resume."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.contest import MALLOC, ROOT

CONFIG = """
from vit_nabirds import config as config_lib

def get_config():
    config = config_lib.default()
    config.model.pretrained = ""
    config.model.update({shape})
    config.batch_size = {batch_size}
    config.optimizer.warmup = "2 steps"
    config.log_every = 1
    return config
"""


def train_command(
    folder: Path, root: str, workdir: Path, steps: int, images: int, batch_size: int, save: int
) -> list[str]:
    # So many more steps than are measured that the end with its evaluation never comes.
    return [
        sys.executable, str(ROOT / "main.py"), f"--config={folder / 'config.py'}", f"--workdir={workdir}",
        f"--config.data.root={root}", f"--config.epochs={1000 * steps * batch_size / images}",
        f"--config.evaluate.every={1000 * steps} steps", f"--config.checkpoint.every={save} steps",
    ]  # fmt: skip


def _seconds_of_steps(workdir: Path, batch_size: int) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: batch_size / x["train/images_per_second"] for x in lines if "train/images_per_second" in x}


def until(step: int, command: list[str], then: int = 0, most: float = threading.TIMEOUT_MAX) -> float:
    """Seconds from the command to the report of a step. At that, or at that of step `then`, it is asked to stop, and
    saves. After `most` seconds it is killed."""
    start, seconds, asked, line = time.perf_counter(), None, False, "no output"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | MALLOC
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
    timer = threading.Timer(most, process.kill)
    timer.daemon = True
    timer.start()
    for line in process.stderr:
        reported = int(found[1]) if (found := re.search(r" step (\d+)/\d+, ", line)) else 0
        if seconds is None and reported >= step:
            seconds = time.perf_counter() - start
        if not asked and reported >= max(step, then):
            asked = True
            process.send_signal(signal.SIGTERM)
    process.wait()
    timer.cancel()
    assert asked, f"the training ended before step {max(step, then)}: {line.strip()}"
    return seconds


def _p99(ascending: list[float]) -> float:
    return ascending[min(len(ascending) - 1, round(0.99 * len(ascending)))]


def run(root: str, images: int, shape: dict, batch_size: int, steps: int, bare: callable, rounds: int) -> dict:
    """`bare` measures the images/s of the bare step; it is called before and after each training."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.py").write_text(CONFIG.format(shape=shape, batch_size=batch_size))

        def measured(step: int, workdir: str, save: int = 1000 * steps, warm: bool = True) -> float:
            if warm:
                shutil.copytree(folder / "started0" / "compiled", folder / workdir / "compiled", dirs_exist_ok=True)
            return until(step, train_command(folder, root, folder / workdir, steps, images, batch_size, save))

        cold, resumed, warm = [], [], []
        for number in range(rounds):
            cold.append(measured(1, f"started{number}", warm=False))
            resumed.append(measured(2, f"started{number}", warm=False))
            warm.append(measured(1, f"warm{number}"))
        ratios, plain = [], []
        before = bare()
        for number in range(rounds):
            measured(steps, f"trained{number}")
            seconds = _seconds_of_steps(folder / f"trained{number}", batch_size)
            plain += list(seconds.values())[1:]
            after = bare()
            speed = batch_size * (len(seconds) - 1) / sum(list(seconds.values())[1:])
            ratios.append(speed / (2 / (1 / before + 1 / after)))
            before = after
        every = max(2, steps // 5)
        measured(steps, "saving", save=every)
        saving = list(_seconds_of_steps(folder / "saving", batch_size).values())[1:]
    saving.sort()
    plain.sort()
    return {
        "train ÷ bare step": statistics.median(ratios),
        "images/s": batch_size / statistics.median(plain),
        "p50 s": statistics.median(saving),
        "p99 s": _p99(saving),
        "p99 s, not saving": _p99(plain),
        "cold s": statistics.median(cold),
        "warm s": statistics.median(warm),
        "resumed s": statistics.median(resumed),
    }
