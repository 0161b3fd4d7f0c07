"""`python -m benchmarks gpu`: on one GPU, our training step beside the peers', the loader beside the step, the start.

JAX never runs in this process: each contender has one of its own (benchmarks/gpu_steps.py), and they use the card one
after the other (benchmarks/gpu_turns.py). What has not been measured when the time is up says so in its row. MFU
counts the products of all tokens in all blocks, for us as for the peers, and nothing that is computed twice.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import contest, loops, steps
from benchmarks.gpu_turns import take_turns
from vit_nabirds.parallel.gpus import peak_of

DEADLINE = time.monotonic() + 510  # of the whole command, which has just started
AT_ONCE = min(4, max(2, (os.cpu_count() or 1) // 4))  # processes that prepare or measure

COLUMNS = [
    "images/s", "slowest round", "fastest round", "MFU %", "host ms", "peak GB", "predicted GB", "peak ÷ predicted",
    "attention",
]  # fmt: skip
MODELS = {
    "ViT-B/16": dict(hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072, patch_size=16),
    "ViT-L/16": dict(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096, patch_size=16),
    "tiny": dict(hidden_size=8, num_layers=1, num_heads=2, mlp_dim=16, patch_size=8),
}
PEERS = ("timm", "Hugging Face")


class Case(NamedTuple):
    model: str
    image_size: int
    dtype: str
    batch_size: int
    peers: tuple[str, ...] = ()
    part: str = ""  # of PARTS

    @property
    def shape(self) -> dict:
        return MODELS[self.model] | {"image_size": self.image_size}

    def __str__(self) -> str:
        part = f", {self.part}" if self.part else ""
        return f"{self.model}, {self.image_size} px, {self.dtype}, {self.batch_size} images{part}"


# What a configuration may add to a step: each is measured alone, beside the step without it.
PARTS = {
    "remat blocks": {"remat": "blocks"},
    "remat elementwise": {"remat": "elementwise"},
    "microbatch 32": {"microbatch": 32},
    "resized crop": {"augment.crop": "resized"},
    "mixup and cutmix": {"augment.mixup": 0.2, "augment.cutmix": 1.0},
    "randaugment": {"augment.policy": "randaugment"},
    "trivialaugment": {"augment.policy": "trivialaugment"},
    "drop path": {"model.drop_path": 0.1},
    "ema": {"ema_decay": 0.99},
    "lora": {"lora.rank": 8},
    "muon": {"optimizer.name": "muon"},
    "color jitter and erasing": {"augment.color_jitter": 0.3, "augment.erasing": 0.25},
    "label smoothing": {"loss.label_smoothing": 0.1},
    "layer decay and clipping": {"optimizer.layer_decay": 0.75, "optimizer.clip_norm": 1.0},
    "lion": {"optimizer.name": "lion"},
    "bfloat16 moments": {"optimizer.moment_dtype": "bfloat16"},
    "dropout": {"model.dropout_rate": 0.1},
}


TRAINED = Case("ViT-B/16", 224, "bfloat16", 256, PEERS)  # that `train` is started with, too
CASES = [  # the most important first
    Case("ViT-B/16", 224, "bfloat16", 64, PEERS),
    Case("ViT-B/16", 224, "bfloat16", 128),
    TRAINED,
    Case("ViT-B/16", 224, "bfloat16", 512),
    Case("ViT-L/16", 224, "bfloat16", 64, PEERS),
    Case("ViT-L/16", 224, "bfloat16", 128),
    Case("ViT-B/16", 448, "bfloat16", 64),
    Case("ViT-L/16", 448, "bfloat16", 32),
    Case("ViT-L/16", 448, "bfloat16", 32, part="remat blocks"),
    Case("ViT-B/16", 224, "float32", 64, ("timm",)),
]
PLAIN = Case("ViT-B/16", 224, "bfloat16", 128)
QUICK = Case("tiny", 16, "bfloat16", 4, PEERS)


def find_card(torch_python: str, quick: bool) -> dict:
    """What this is measured on: one card, for us and the peers. Without one it ends the program, unless `quick`."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if quick:
        os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}  # torch's threads would wait for each other
    code = "import jax; print(jax.default_backend(), jax.__version__, jax.devices()[0].device_kind)"
    backend, jax_version, kind = (_output([sys.executable, "-c", code]) or "nothing – –").split(" ", 2)
    if backend != "gpu" and not quick:
        sys.exit(
            f"error: the part gpu needs a GPU, and JAX sees {backend} (BUILD.md, GPUs); --quick tries it on the CPU"
        )
    card = {"card": kind, "jax": jax_version}
    if driver := _output(["nvidia-smi", "--query-gpu=driver_version,compute_mode", "--format=csv,noheader"]):
        card["driver"], card["compute mode"] = driver.splitlines()[0].split(", ")
    for name in ("torch", "timm", "transformers"):
        code = f"from importlib.metadata import version; print(version({name!r}))"
        card[name] = _output([torch_python, "-c", code]) or "not installed"
    return card


def _output(command: list[str]) -> str:
    """Empty if the command fails."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return "" if done.returncode else done.stdout.strip()
    return ""


def run(root: str, images: int, card: dict, torch_python: str, quick: bool, table: Callable) -> dict:
    """All of it, printed by `table`, and returned for JSON. `root` is a packed folder with so many `images`."""
    trained, cases = (QUICK, [QUICK]) if quick else (TRAINED, CASES)
    start, train = _start(root, images, trained, stop=6 if quick else 30)
    loader = _loader(root, trained.batch_size, quick)
    rows = _steps(cases, card, torch_python, quick)
    versions = ", ".join(f"{name} {version}" for name, version in card.items() if name != "card")
    table(
        f"Training step on {card['card']} ({versions}). The peers do not augment: they take float images of the "
        "model's size",
        {name: row if "skipped" in row else {x: row.get(x, "–") for x in COLUMNS} for name, row in rows.items()},
    )
    step = rows[f"{trained}: ours"]
    feeding = {f"loader, {name.removeprefix('ours ')}": row for name, row in loader.items()}
    feeding = _beside(step, feeding | {"`train`, packed": train, "the step alone": step})
    table(f"Input on {os.cpu_count()} cores, for {trained}", feeding)
    table("From the command `main.py train` to the report of its first step", {str(trained): start})
    return {"on": card, "step": rows, "input": feeding, "start": start}


def run_parts(card: dict, quick: bool, table: Callable) -> dict:
    """The part `gpu-parts`: our step with each of PARTS alone, beside the step without any."""
    plain, parts = (QUICK._replace(peers=()), ["ema"]) if quick else (PLAIN, PARTS)
    cases = [plain, *(plain._replace(part=part) for part in parts)]
    with tempfile.TemporaryDirectory() as kept:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = kept  # XLA keeps its choices of kernels there, for all cases
        rows = _steps(cases[:1], card, sys.executable, quick)
        rows = list((rows | _steps(cases[1:], card, sys.executable, quick, kernels_are_chosen=True)).values())
    columns = [column for column in COLUMNS if column != "MFU %"]
    found = {}
    for case, row in zip(cases, rows, strict=True):
        shown = {"÷ none": _ratio(row, rows[0])} | {column: row.get(column, "–") for column in columns}
        found[case.part or "none"] = row if "skipped" in row else shown
    table(f"Our step with one part more on {card['card']} (jax {card['jax']}), {plain}", found)
    return {"on": card, "step": found}


def _loader(root: str, batch_size: int, quick: bool) -> dict[str, dict]:
    """Of `train`, with all cores."""
    arguments = dict(root=root, batch_size=batch_size, count=2 if quick else 8)
    packed = contest.run("inputs", ["ours packed"], arguments, 3, {})
    # One round: before another, its processes, two batches each, would fill more than inputs.py leaves out.
    return packed | contest.run("inputs", ["ours from JPEG"], arguments | {"count": 20 if quick else 80}, 1, {})


def _beside(step: dict, rows: dict[str, dict]) -> dict[str, dict]:
    """Their speeds beside that of the step, where both have been measured."""
    results = {}
    for name, row in rows.items():
        found = {
            "images/s": row.get("images/s"),
            "÷ step": _ratio(row, step),
            "waits for input %": row.get("waits for input %", "–"),
        }
        results[name] = row if "skipped" in row else found
    return results


def _ratio(row: dict, other: dict) -> float | str:
    speeds = row.get("images/s"), other.get("images/s")
    return speeds[0] / speeds[1] if all(isinstance(speed, float) for speed in speeds) else "–"


def _start(root: str, images: int, case: Case, stop: int) -> tuple[dict, dict]:
    """Of `train` with an empty and with a filled compilation cache; and its speed in the second run, to step `stop`."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.py").write_text(loops.CONFIG.format(shape=case.shape, batch_size=case.batch_size))

        def seconds(workdir: str, then: int) -> float:
            command = loops.train_command(folder, root, folder / workdir, stop, images, case.batch_size, 1000 * stop)
            most = (DEADLINE - time.monotonic()) / 3  # the steps matter more
            return loops.until(1, [*command, f"--config.compute_dtype={case.dtype}"], then, most)

        try:
            cold = seconds("cold", then=1)
            shutil.copytree(folder / "cold" / "compiled", folder / "warm" / "compiled")
            warm = seconds("warm", then=stop)
        except AssertionError as error:
            row = {"skipped": f"skipped: {error}"}
            return row, row
        lines = map(json.loads, (folder / "warm" / "metrics.jsonl").read_text().splitlines())
        reports = [line for line in lines if "train/images_per_second" in line][2:]
    speed, waits = (statistics.median(x[f"train/{y}"] for x in reports) for y in ("images_per_second", "input_wait"))
    start = {"cold cache s": cold, "warm cache s": warm, "warm ÷ cold": warm / cold}
    return start, {"images/s": speed, "waits for input %": 100 * waits}


def _steps(
    cases: list[Case], card: dict, torch_python: str, quick: bool, kernels_are_chosen: bool = False
) -> dict[str, dict]:
    """With kernels that an earlier case has chosen, more compile beside each other, and none has the GPU meanwhile."""
    jobs, cases_of = {}, {}
    for case in cases:
        arguments = dict(shape=case.shape, dtype=case.dtype, batch_size=case.batch_size)
        arguments |= dict(fields=PARTS.get(case.part, {}), device="cpu" if quick else "cuda")
        arguments = json.dumps(arguments | dict(kernels_are_chosen=kernels_are_chosen))
        for name in ("ours", *case.peers):
            python = sys.executable if name == "ours" else torch_python
            jobs[f"{case}: {name}"] = [python, "-m", "benchmarks.gpu_steps", name, arguments]
            cases_of[f"{case}: {name}"] = case
    shared = card.get("compute mode", "Default") == "Default"  # another mode admits one process at a time
    at_once = max(AT_ONCE, 3 * (os.cpu_count() or 1) // 4) if kernels_are_chosen else AT_ONCE
    rows = take_turns(jobs, at_once if shared else 1, DEADLINE, _report)
    for name, row in rows.items():
        case, speed = cases_of[name], row.get("images/s")
        peak = peak_of(card["card"], case.dtype)
        if peak and isinstance(speed, float):
            row["MFU %"] = 100 * speed * steps.flops_of_model(case.shape) / peak
    return rows


def _report(name: str, row: dict) -> None:
    speed = row.get("images/s")
    result = f"{speed:,.0f} images/s" if isinstance(speed, float) else speed or row["skipped"]
    print(f"{DEADLINE - time.monotonic():.0f} s left. {name}: {result}", file=sys.stderr, flush=True)
