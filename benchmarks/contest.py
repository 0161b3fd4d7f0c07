"""Contenders in processes of their own, measured in turns: what disturbs the machine disturbs all of them.

A contender is a function that makes itself ready and returns another, which measures one round and returns a dict of
numbers. `python -m benchmarks.contest MODULE NAME JSON` runs one and measures a round for each line that it reads.
"""

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # BUILD.md, Large pages
ENDED = "ended with exit code"


def run(
    module: str, names: list[str], arguments: dict, rounds: int, pythons: dict[str, str], cores: int | None = None
) -> dict[str, dict]:
    """{name: {quantity: median over the rounds}}; a contender that cannot run has the one entry `skipped`."""
    processes, results, starts = {}, {}, {}
    for name in names:
        # Ours in the environment that the Makefile and launch/ give it, the peers as their users start them. With this
        # setting torch would gain nothing; the others, which XLA compiles, would.
        malloc = MALLOC if name.startswith("ours") else {}
        command = [pythons.get(name, sys.executable), "-m", "benchmarks.contest", module, name, json.dumps(arguments)]
        if cores:
            command = ["taskset", "--cpu-list", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores])), *command]
        processes[name] = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | malloc, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if rounds > 1:  # one after the other: the time to the first step is measured too
            starts[name] = _answer(processes[name])
    for name, process in list(processes.items()):
        ready = starts[name] if name in starts else _answer(process)
        results[name] = [] if ready == {} else ready
        if ready:
            processes.pop(name).communicate()
    for _ in range(rounds):
        for name, process in list(processes.items()):
            with contextlib.suppress(BrokenPipeError):  # no answer says so, too
                process.stdin.write("\n")
                process.stdin.flush()
            results[name].append(_answer(process))
            if "skipped" in results[name][-1]:
                processes.pop(name)
    for process in processes.values():
        process.communicate()
    medians = {}
    for name, rows in results.items():
        if isinstance(rows, dict):
            medians[name] = rows
        elif failed := [row for row in rows if "skipped" in row]:
            medians[name] = failed[0]
        else:
            medians[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return medians


def _answer(process: subprocess.Popen) -> dict:
    for line in process.stdout:
        if line.startswith("answer "):
            return json.loads(line.removeprefix("answer "))
    return {"skipped": f"{ENDED} {process.wait()}"}


def _serve(module: str, name: str, arguments: dict) -> None:
    try:
        measure = importlib.import_module(f"benchmarks.{module}").CONTENDERS[name](**arguments)
    except ImportError as error:
        print("answer", json.dumps({"skipped": f"not installed: {error.name}"}), flush=True)
        return
    print("answer {}", flush=True)
    for _ in sys.stdin:
        print("answer", json.dumps(measure()), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
