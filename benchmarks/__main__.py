"""Every benchmark, ours and the peers' side by side in one run:  python -m benchmarks [--json=FILE] [PART ...]"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import accuracy, contest, gpu, inputs, loops, scaling, steps
from vit_nabirds.errors import UserError

VIT_S = dict(hidden_size=384, num_layers=12, num_heads=6, mlp_dim=1536, patch_size=16, image_size=224)
TINY = dict(hidden_size=8, num_layers=12, num_heads=2, mlp_dim=16, patch_size=8, image_size=16)
PARTS = ("input", "host", "step", "loop", "scaling")
ON_GPU = ("gpu", "gpu-parts")
OF_TINY_MODELS = "\nOf tiny models for moments: these numbers say that the scripts work, and nothing else."


def table(title: str, rows: dict[str, dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row if key != "skipped"))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, row in rows.items():
        cells = [row["skipped"]] if "skipped" in row else [show(row[key]) for key in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return ", ".join(f"{count} {kind}" for kind, count in value.items()) if isinstance(value, dict) else str(value)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what it has drawn would be left
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all these), gpu, gpu-parts, or accuracy"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all that was measured there")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared and packed (default: birds are drawn)")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="of an environment with torch")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of accuracy: to start from")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of accuracy: of its runs, to go on with")
    parser.add_argument("--seeds", type=int, metavar="N", help="of accuracy: 0 to N - 1 (default: 3)")
    parser.add_argument("--only", metavar="NAME,...", help="of accuracy: these recipes (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that all of it works")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in (*PARTS, *ON_GPU, "accuracy")]:
        parser.error(f"there is no part {unknown[0]!r}: it is one of {', '.join((*PARTS, *ON_GPU))}, accuracy")
    if shutil.which(options.torch) is None:
        parser.error(f"--torch={options.torch} is no program")
    try:
        if options.json:
            options.json.open("a").close()
    except OSError as error:
        parser.error(f"--json: {error}")
    if "accuracy" in options.parts:
        return of_accuracy(options, parser)
    if given := [name for name in ("weights", "out", "seeds", "only") if getattr(options, name) is not None]:
        parser.error(f"--{given[0]} belongs to the part accuracy")
    try:
        if options.data and not inputs.open_images(options.data, packed=True).is_packed:
            parser.error(f"--data={options.data} is not packed: prepare it with --pack")
    except UserError as error:
        parser.error(f"--data: {error}")
    quick = options.quick
    card = gpu.find_card(options.torch, quick) if set(ON_GPU) & set(options.parts) else {}
    parts = options.parts or [part for part in PARTS if not (quick and part == "host")]  # with tiny models, as `step`
    tiny = TINY | {"num_layers": 1} if quick else TINY
    shape, batch_size, rounds = (tiny, 4, 1) if quick else (VIT_S, 8, 5)
    pythons = {name: options.torch for name in ("torch", "torch, 2 workers", "torch with timm")}
    targets, measured = [], {}

    def target(name: str, value: float | None, goal: float, at_most: bool = False) -> None:
        met = None if value is None else (value <= goal if at_most else value >= goal)
        targets.append({"name": name, "value": value, "target": f"{'≤' if at_most else '≥'} {goal:,}", "met": met})

    def ratio(rows: dict, quantity: str, ours: str, theirs: str) -> float | None:
        values = [rows[name].get(quantity) for name in (ours, theirs)]
        return None if None in values else values[0] / values[1]

    with tempfile.TemporaryDirectory() as folder:
        root = options.data
        if root is None:
            root, size = Path(folder) / "birds", shape["image_size"]
            subprocess.run([sys.executable, "-m", "benchmarks.draw", root, str(size), str(quick)], check=True)
        images = len(inputs.open_images(root, packed=True))

        if "input" in parts:
            arguments = dict(root=str(root), batch_size=64 // (8 if quick else 1), count=8 if quick else 32)
            rows = contest.run("inputs", inputs.ONE_CORE, arguments, rounds, pythons, cores=1)
            rows |= contest.run("inputs", inputs.HOST, arguments, rounds, pythons)
            rows |= contest.run("inputs", inputs.AUGMENTED, arguments | {"batch_size": 8}, rounds, pythons)
            measured["input"] = rows
            table("Input, images to a batch in the host's memory", rows)
            peers = [rows[name].get("images/s") for name in ("torch", "torch, 2 workers")]
            target("ours packed ÷ seed's pipeline", ratio(rows, "images/s", "ours packed", "seed"), 1000)
            target("ours packed, one core, images/s", rows[inputs.ONE_CORE[0]].get("images/s"), 15_000)
            target("ours from JPEG ÷ decoding alone", ratio(rows, "images/s", "ours from JPEG", "decoding alone"), 0.85)
            ours = rows["ours augmented"].get("images/s")
            best = None if None in (ours, *peers) else ours / max(peers)
            target("ours from JPEG, augmented ÷ torch's best", best, 1.5)
        if "host" in parts:
            arguments = dict(shape=tiny, batch_size=8, count=10 if quick else 100)
            rows = measured["host"] = contest.run("steps", steps.HOST, arguments, rounds, pythons)
            table(
                f"Host time of a step, {tiny['num_layers']} layers",
                {name: {"ms": row["host ms/step"]} for name, row in rows.items()},
            )
            target(
                "host time of a step ÷ nnx.jit's",
                ratio(rows, "host ms/step", *steps.HOST),
                round(1 / 15, 4),
                at_most=True,
            )
        if "step" in parts:
            arguments = dict(shape=shape, batch_size=batch_size, count=2)
            rows = measured["step"] = contest.run("steps", steps.SPEED, arguments, rounds, pythons)
            table(f"Step, {shape['image_size']} px, {batch_size} images, float32, AdamW", rows)
            best = max(steps.SPEED[:2], key=lambda name: rows[name].get("images/s", 0))
            for theirs, goal in zip(steps.SPEED[2:5], (1.5, 1.2, 1.0), strict=True):
                target(f"step ÷ {theirs}", ratio(rows, "images/s", best, theirs), goal)
        if "loop" in parts:
            arguments = dict(shape=shape, batch_size=batch_size, count=4)

            def bare() -> float:
                return contest.run("steps", ["ours"], arguments, 3, pythons)["ours"]["images/s"]

            row = loops.run(str(root), images, shape, batch_size, 10 if quick else 30, bare, 1 if quick else 3)
            measured["loop"] = row
            table("Training", {f"{shape['image_size']} px, {batch_size} images": row})
            target("train ÷ bare step", row["train ÷ bare step"], 0.97)
            target("p99 ÷ median step while saving", row["p99 s"] / row["p50 s"], 1.25, at_most=True)
            target("start to first step, warm ÷ cold cache", row["warm s"] / row["cold s"], 0.4, at_most=True)
        if "gpu" in parts:
            measured["gpu"] = gpu.run(str(root), images, card, options.torch, quick, table)
        if "gpu-parts" in parts:
            measured["gpu-parts"] = gpu.run_parts(card, quick, table)
        if "scaling" in parts:
            counts = [1, 8] if quick else [1, 8, 64, 512]
            rows = measured["scaling"] = scaling.run(counts, shape, batch_size)
            table(f"The compiled step, {batch_size} images a device", {str(row["devices"]): row for row in rows})
            reduced = [row["all-reduced MB"] for row in rows[1:]]
            target("all-reduced bytes, most ÷ 8 devices", max(reduced) / reduced[0], 1.0, at_most=True)
            target("all-reduced bytes ÷ gradients", max(reduced) / rows[0]["gradients MB"], 1.01, at_most=True)
            target("other communication, %", max(row["other %"] for row in rows), 1, at_most=True)

    if targets:
        print(f"\nTargets, on {machine()}\n\n| | measured | target | met |\n|---|---:|---:|---|")
    for row in targets:
        value = "not measured" if row["value"] is None else show(float(row["value"]))
        met = {None: "—", True: "yes", False: "NO"}[row["met"]]
        print(f"| {row['name']} | {value} | {row['target']} | {met} |")
    if quick:
        print(OF_TINY_MODELS)
    results = [measured.get(part, {}) for part in ("input", "host", "step")]
    results += [measured.get(part, {}).get("step", {}) for part in ON_GPU]
    rows = [row for result in results for row in result.items()]
    broken = [f"{name} {row['skipped']}" for name, row in rows if contest.ENDED in row.get("skipped", "")]
    if options.json:
        write_results(options.json, targets, measured)
    if broken:
        sys.exit(f"error: {'; '.join(broken)}; see above for why")


def of_accuracy(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The part `accuracy`: trainings of hours, whose table is there after each of them."""
    if len(options.parts) > 1:
        parser.error("accuracy trains for hours: run it alone, because whatever is measured beside it would be wrong")
    missing = [f"--{name}" for name in ("data", "weights", "out") if getattr(options, name) is None]
    if missing and not options.quick:
        parser.error(f"accuracy needs {' and '.join(missing)}")
    seeds = options.seeds if options.seeds is not None else 1 if options.quick else 3
    if seeds < 1:
        parser.error(f"--seeds={seeds}: give 1 or more")

    def report(title: str, rows: dict[str, dict], details: dict[str, dict]) -> None:
        table(title, rows)
        if options.json:
            write_results(options.json, [], {"accuracy": {name: rows[name] | details[name] for name in rows}})

    with tempfile.TemporaryDirectory() as folder:
        try:
            names = accuracy.chosen(options.only, options.quick)
            out = options.out or Path(folder)
            failed = accuracy.run(options.data, options.weights, out, seeds, names, options.quick, report)
        except UserError as error:
            parser.error(str(error))
    print(OF_TINY_MODELS if options.quick else f"\nOn {machine()}")
    if failed:
        sys.exit(f"error: {'; '.join(failed)}")


def write_results(file: Path, targets: list[dict], measured: dict) -> None:
    file.write_text(json.dumps({"machine": machine(), "targets": targets, "measured": measured}, indent=2) + "\n")


def machine() -> str:
    return f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, {versions()}"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "grain"))


if __name__ == "__main__":
    main()
