"""`python -m benchmarks accuracy`: what each part of the recipe does to the test accuracy, alone and with others.

    python -m benchmarks accuracy --data=FOLDER --weights=FOLDER --out=FOLDER [--seeds=3] [--only=NAME,...]

Each of RECIPES is trained with each seed by `main.py`, in a process and a workdir of its own, OUT/NAME/SEED; the first
seed of all comes before the second of any. It may be stopped or killed at any time: the same command goes on. What is
finished is not run again, also not after a change of the code: then use another --out. Of a finished run its figures,
predictions and log stay, and its checkpoints, the gigabyte, go.
"""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from benchmarks.contest import MALLOC, ROOT
from configs import birds60
from vit_nabirds.config import Config
from vit_nabirds.data.images import open_images
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import ConfigError, UserError, say
from vit_nabirds.files import write_json
from vit_nabirds.parallel.locks import lock
from vit_nabirds.parallel.preemption import EXIT_STOPPED
from vit_nabirds.runs.apart import LOG, train_apart
from vit_nabirds.runs.summary import changes, read_summary

PLAIN = "plain"  # the others' differences are from this one
GENTLE = {
    "augment.crop": "resized", "augment.area": (0.35, 1.0), "loss.label_smoothing": 0.1, "model.drop_path": 0.1,
    "ema_decay": 0.99,
}  # fmt: skip
MIX = {"augment.mixup": 0.2, "augment.cutmix": 1.0, "augment.mixed": 0.5}
# With a larger rate at the top, or the mean rate would fall with it. The head's own rate is always that of `plain`.
LAYER_DECAY = {"optimizer.layer_decay": 0.75, "optimizer.learning_rate": 1e-4, "optimizer.head_multiplier": 15.0}
# Fields on top of configs/birds60.py; those of which most is expected come first.
RECIPES = {
    PLAIN: {},
    "ema": {"ema_decay": 0.99},
    "gentle": GENTLE,
    "label-smoothing": {"loss.label_smoothing": 0.1},
    "resized-crop": {"augment.crop": "resized", "augment.area": (0.35, 1.0)},
    "layer-decay": LAYER_DECAY,
    "views-flip": {"evaluate.views": "flip"},
    "gentle+layer-decay": GENTLE | LAYER_DECAY,
    "trivialaugment": {"augment.policy": "trivialaugment"},
    "cutmix": {"augment.cutmix": 1.0, "augment.mixed": 0.5},
    "mixup": {"augment.mixup": 0.2},
    "drop-path": {"model.drop_path": 0.1},
    "cls+mean": {"model.pool": "cls+mean"},
    "gentle+mix": GENTLE | MIX,
    "lora": {"lora.rank": 8, "optimizer.learning_rate": 3e-4, "optimizer.head_multiplier": 5.0},
    "erasing": {"augment.erasing": 0.25},
    "randaugment": {"augment.policy": "randaugment"},
    "color-jitter": {"augment.color_jitter": 0.3},
    "repeats": {"data.repeats": 2},
    "binary": {"loss.name": "binary"},
    "muon": {"optimizer.name": "muon"},  # its steps are as large as Adam's
    # Smaller, with a larger decay: each element of its steps is 1, before the rate.
    "lion": {"optimizer.name": "lion", "optimizer.learning_rate": 6e-6, "optimizer.weight_decay": 0.25},
    # Strong augmentation needs longer trainings to pay: these two belong together.
    "plain-12-epochs": {"epochs": 12.0},
    "gentle+mix-12-epochs": GENTLE | MIX | {"epochs": 12.0},
    # Nothing but chance where all classes have equally many photographs.
    "class-weights": {"loss.class_weights": "balanced"},
    "sampling-sqrt": {"data.sampling": "sqrt"},
    "sampling-balanced": {"data.sampling": "balanced"},
}
TINY = dict(hidden_size=8, num_layers=2, num_heads=2, mlp_dim=16, patch_size=8, image_size=16)
QUICK = {"epochs": 2.0, "data.workers": 0, "optimizer.warmup": "2 steps"} | {f"model.{k}": v for k, v in TINY.items()}
QUICK_NAMES = (PLAIN, "gentle+mix")


def run(
    data: Path | None, weights: Path | None, out: Path, seeds: int, names: list[str], quick: bool, report: Callable
) -> list[str]:
    """Train what is not finished yet, and after each run call report(title, rows, details) with all that is.

    Returns what failed, a line each; UserError for a mistake of the user's, before anything is trained.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shared = QUICK if quick else {}
    shared = shared | _inputs(data or _drawn(out / "birds"), weights)
    runs = {out / name / str(seed): shared | RECIPES[name] | {"seed": seed} for seed in range(seeds) for name in names}
    for workdir, fields in runs.items():
        _check(workdir, fields)

    failed, reported = [], False
    # The run has the lock too: it keeps others out if it outlives this process.
    with lock(out / "lock", f"another benchmark, or a run that one has left behind, trains in {out}: wait.") as held:
        for number, (workdir, fields) in enumerate(runs.items(), start=1):
            is_new = not (workdir / "results.json").exists()
            if is_new:
                print(f"{number} of {len(runs)}: {workdir / LOG}", file=sys.stderr, flush=True)
                if problem := _train(workdir, fields, held.fileno()):
                    failed.append(f"{workdir}: {problem}")
                    say(failed[-1])
                    continue
            for folder in ("checkpoints", "compiled"):
                shutil.rmtree(workdir / folder, ignore_errors=True)
            if is_new:
                report(*_table(out, names, seeds))
                reported = True
    if not reported and len(failed) < len(runs):
        report(*_table(out, names, seeds))
    return failed


def _inputs(data: Path, weights: Path | None) -> dict[str, object]:
    """Their fields, with absolute paths; UserError if they are not there. The data decide how large images are."""
    size = open_images(data, read_table(data), False).size
    if weights and not (weights / "config.json").is_file():
        raise UserError(f"{weights} has no config.json: give a folder of pretrained weights.")
    pretrained = str(weights.resolve()) if weights else ""
    return {"data.root": str(data.resolve()), "model.pretrained": pretrained, "model.image_size": size}


def _drawn(folder: Path) -> Path:
    """The folder, with birds for models of TINY's size."""
    if not (folder / "metadata.parquet").exists():
        command = [sys.executable, "-m", "benchmarks.draw", str(folder), str(TINY["image_size"]), "True"]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def _check(workdir: Path, fields: dict[str, object]) -> None:
    """ConfigError for a wrong field; UserError if the workdir holds a run with other ones."""
    config = birds60.get_config()
    config.update_from_flattened_dict(fields)
    if changed := changes(read_summary(workdir), Config.read(config)):
        raise UserError(
            f"{workdir} holds a run with another configuration "
            f"({'; '.join(f'{name}: {change}' for name, change in changed.items())}): use another --out, or delete "
            "that folder."
        )


def _train(workdir: Path, fields: dict[str, object], held: int) -> str:
    """Start or resume a run, and wait for its end. Returns what went wrong, or nothing; a request to stop is passed on,
    and ends this process when all is saved."""
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "main.py", "--config=configs/birds60.py", f"--workdir={workdir}", *flags]
    spent = functools.partial(_add_seconds, workdir / "seconds.json", _seconds(workdir))
    code, said = train_apart(command, workdir, held, spent, cwd=ROOT, env=os.environ | MALLOC)
    if code == EXIT_STOPPED:
        _stop()
    return f"exit code {code}: {said}" if code else ""


def _add_seconds(clock: Path, before: float, seconds: float) -> None:
    write_json(clock, {"seconds": before + seconds})


def _stop() -> NoReturn:
    say("stopped: the same command goes on")
    sys.exit(EXIT_STOPPED)


def _seconds(workdir: Path) -> float:
    """That processes have spent on a run up to now."""
    file = workdir / "seconds.json"
    return json.loads(file.read_text())["seconds"] if file.exists() else 0.0


def _table(out: Path, names: list[str], seeds: int) -> tuple[str, dict[str, dict], dict[str, dict]]:
    """Title; a row by name, of what is finished; the fields and the runs of each by name."""
    runs = {name: [found for seed in range(seeds) if (found := _result(out / name / str(seed)))] for name in names}
    runs = {name: found for name, found in runs.items() if found}
    plain = {found["seed"]: found["test %"] for found in runs.get(PLAIN, [])}
    rows = {}
    for name, found in runs.items():
        tests = [x["test %"] for x in found]
        paired = [x["test %"] - plain[x["seed"]] for x in found if x["seed"] in plain]
        rows[name] = {
            "seeds": len(found),
            "test %": statistics.mean(tests),
            "lowest": min(tests),
            "highest": max(tests),
            f"− {PLAIN}": statistics.mean(paired) if paired else "–",  # with the same seeds
            "validation %": statistics.mean(x["validation %"] for x in found),
            "last test %": statistics.mean(x["last test %"] for x in found),
            "hours a run": statistics.mean(x["hours"] for x in found),
        }
    examples = next(x["examples"] for found in runs.values() for x in found)
    title = f"Accuracy of the selected checkpoint on {examples:,} test photographs, each worth {100 / examples:.2g} %"
    return title, rows, {name: {"fields": RECIPES[name], "runs": found} for name, found in runs.items()}


def _result(workdir: Path) -> dict | None:
    if not (file := workdir / "results.json").exists():
        return None
    results = json.loads(file.read_text())
    return {
        "seed": int(workdir.name),
        "step": results["selected"]["step"],
        "examples": results["test"]["examples"],
        "test %": 100 * results["test"]["accuracy"],
        "interval %": [100 * x for x in results["test"]["accuracy_interval"]],
        "last test %": 100 * results["last"]["test"]["accuracy"],
        "validation %": 100 * results["selected"]["value"],
        "hours": _seconds(workdir) / 3600,
    }


def chosen(only: str | None, quick: bool) -> list[str]:
    """Names of RECIPES; ConfigError for one that is not among them."""
    names = only.split(",") if only else list(QUICK_NAMES if quick else RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        raise ConfigError(f"there is no recipe {unknown[0]!r}: they are {', '.join(RECIPES)}")
    return names
