"""A training under random faults, for hours:  python -m tests.soak [--hours=1] [--seed=0] [--workdir=DIR]

It trains configs/demo.py without end and starts it again as launch/ would. It checks that each start goes on from the
newest checkpoint that is whole, that every step that is trained twice has the same loss, bit for bit, that no process
is left behind, and how memory, threads and open files grow. It exits with 1 if anything is wrong. As root, the workdir
is a small file system of its own, which is full now and then.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
GOES_ON = {75, 74, 137, -signal.SIGKILL}  # exit codes of what launch/ queues again
FIGURES = ("MiB", "threads", "open files")


class Soak:
    """The training, what has been done to it, and what was wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.workdir, self.draw = folder, folder / "run", random.Random(seed)
        self.faults, self.codes, self.wrong = collections.Counter(), collections.Counter(), []
        self.losses, self.repeated, self.lost, self.lives = {}, 0, 0, []
        self.process = None

    def start(self) -> None:
        command = [sys.executable, "main.py", "--config=configs/demo.py", f"--workdir={self.workdir}"]
        fields = {"data.root": self.folder / "birds", "epochs": 1e6, "log_every": 1, "checkpoint.every": "40 steps"}
        fields |= {"evaluate.every": "200 steps", "watchdog_timeout": "1 minute", "data.workers": 1}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, *(f"--config.{name}={value}" for name, value in fields.items())],
                cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def steps(self) -> dict[int, tuple[float, float]]:
        """By step, the loss in metrics.jsonl and when it was written."""
        found = {}
        for line in read(self.workdir / "metrics.jsonl").splitlines():
            try:
                line = json.loads(line)
                found |= {line["step"]: (line["train/loss"], line["time"])} if "train/loss" in line else {}
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def checkpoints(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        return sorted(int(file.name) for file in folder.glob("[0-9]*") if file.name.isdecimal())

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    def trains(self, more: int, seconds: float = 180) -> bool:
        """Wait until it has trained `more` steps; False if it ends, or does not move."""
        deadline, first = time.monotonic() + seconds, max(self.steps(), default=0)
        while time.monotonic() < deadline and self.process.poll() is None:
            if max(self.steps(), default=0) >= first + more:
                return True
            time.sleep(0.3)
        self.check(self.process.poll() is not None, f"it stands still at step {first}")
        return False

    def account(self) -> None:
        """Compare what it has trained with what was trained before, and look for gaps."""
        found = self.steps()
        again = {step for step in found.keys() & self.losses.keys() if found[step] != self.losses[step]}
        self.repeated += len(again)
        different = sorted(step for step in again if found[step][0] != self.losses[step][0])
        self.check(not different, f"steps {different[:5]} have other losses than before")
        steps = sorted(found)
        self.check(steps == list(range(1, len(steps) + 1)), f"{len(steps)} steps up to {steps[-1:]} in metrics.jsonl")
        self.losses |= found

    def measure(self) -> tuple[float, int, int] | None:
        """MiB, threads and open files of the training."""
        try:
            status, files = (
                Path(f"/proc/{self.process.pid}/status").read_text(),
                os.listdir(f"/proc/{self.process.pid}/fd"),
            )
        except OSError:
            return None
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), len(files)

    def end(self) -> int:
        """Its exit code; nothing of it may be left."""
        try:
            code = self.process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            self.check(False, "it does not end")
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        deadline = time.monotonic() + 15
        while (left := members(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.check(not left, f"{len(left)} processes outlive a training that ended with {code}")
        self.codes[code] += 1
        self.check(code in GOES_ON, f"exit code {code}: {read(self.folder / 'log')[-300:]}")
        return code


def members(group: int) -> list[int]:
    """Processes of a session that run."""
    found = subprocess.run(["pgrep", "-s", str(group), "-r", "D,R,S,T"], capture_output=True, text=True).stdout
    return list(map(int, found.split()))


def workers(soak: Soak) -> list[int]:
    return [process for process in members(soak.process.pid) if b"spawn_main" in command_of(process)]


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


# Faults of a training that runs. Those of the first kind it survives; the second end it.


def stop_worker(soak: Soak) -> None:
    for worker in workers(soak)[:1]:
        os.kill(worker, signal.SIGSTOP)


def kill_workers(soak: Soak) -> None:
    for worker in workers(soak):
        os.kill(worker, signal.SIGKILL)


def suspend(soak: Soak) -> None:
    os.killpg(soak.process.pid, signal.SIGSTOP)
    time.sleep(soak.draw.uniform(1, 90))  # also longer than the watchdog waits
    os.killpg(soak.process.pid, signal.SIGCONT)


def fill_disk(soak: Soak) -> None:
    filler = soak.workdir / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while file.write(bytes(2**16)):
                pass
    except OSError:
        pass
    time.sleep(soak.draw.uniform(1, 20))
    filler.unlink()


def train_beside_it(soak: Soak) -> None:
    first, soak.process = soak.process, None
    soak.start()
    code = soak.process.wait()
    soak.process = first
    soak.check(code == 1, f"a second training in the same workdir ended with {code}")


def ask_to_stop(soak: Soak) -> None:
    os.killpg(soak.process.pid, soak.draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]))


def kill(soak: Soak) -> None:
    os.kill(soak.process.pid, signal.SIGKILL)


def stop_worker_and_ask(soak: Soak) -> None:
    stop_worker(soak)
    ask_to_stop(soak)


# Damages of what lies there when it starts again.


def damage_checkpoint(soak: Soak) -> None:
    if len(steps := soak.checkpoints()) > 1:
        flip(soak, [x for x in (soak.workdir / "checkpoints" / str(steps[-1])).rglob("*") if x.is_file()])


def damage_metrics(soak: Soak) -> None:
    with (soak.workdir / "metrics.jsonl").open("ab") as file:
        file.write(soak.draw.randbytes(40) + b"\n")


def damage_selection(soak: Soak) -> None:
    flip(soak, [x for x in [soak.workdir / "selection.json"] if x.exists()])


def lose_compiled(soak: Soak) -> None:
    flip(soak, [x for x in (soak.workdir / "compiled").rglob("*") if x.is_file()])


def flip(soak: Soak, files: list[Path]) -> None:
    """A bit of one of these files."""
    if files and (content := bytearray((file := soak.draw.choice(sorted(files))).read_bytes())):
        content[soak.draw.randrange(len(content))] ^= 1 << soak.draw.randrange(8)
        file.write_bytes(content)


SURVIVED = [stop_worker, kill_workers, suspend, fill_disk, train_beside_it]
ENDING = [ask_to_stop, kill, stop_worker_and_ask]
DAMAGES = [damage_checkpoint, damage_metrics, damage_selection, lose_compiled]


def run(soak: Soak, deadline: float, full_disks: bool) -> None:
    survived = [fault for fault in SURVIVED if full_disks or fault is not fill_disk]
    while time.monotonic() < deadline:
        before, damaged = soak.checkpoints(), None
        if before and soak.draw.random() < 0.5:
            damaged = soak.draw.choice(DAMAGES)
            soak.faults[damaged.__name__] += 1
            damaged(soak)
        soak.start()
        if not soak.trains(30):
            soak.end()
            continue
        # With a damaged checkpoint, the one before it is the newest that is whole.
        newest = before[-2 if damaged is damage_checkpoint and len(before) > 1 else -1] if before else 0
        log = read(soak.folder / "log").rsplit("steps ", 1)[-1]
        started = int(log.split(" to ")[0]) if " to " in log else -1
        soak.check(started >= newest, f"it went on from step {started}, not {newest}")
        first = soak.measure()
        for fault in soak.draw.choices(survived, k=soak.draw.randint(0, 3)):
            soak.faults[fault.__name__] += 1
            fault(soak)
            if not soak.trains(30, 240):
                break
        if soak.process.poll() is None:
            soak.trains(soak.draw.randint(1, 60))
            if first and (last := soak.measure()):
                soak.lives.append((first, last))
            fault = soak.draw.choice(ENDING)
            soak.faults[fault.__name__] += 1
            trained = max(soak.steps(), default=0)
            fault(soak)
            code = soak.end()
            if code == 75:  # asked to stop: all is saved
                soak.lost += max(0, trained - soak.checkpoints()[-1])
        else:
            soak.end()
        soak.account()
        print(f"{(deadline - time.monotonic()) / 60:.0f} minutes left, step {max(soak.losses, default=0)}", flush=True)


def report(soak: Soak) -> None:
    print("faults:", ", ".join(f"{name} {count}" for name, count in sorted(soak.faults.items())))
    print("exit codes:", dict(soak.codes))
    print(f"{max(soak.losses, default=0):,} steps; {soak.repeated:,} trained again, all with the same loss unless said")
    print(f"steps lost after a request to stop: {soak.lost}")
    for place, name in enumerate(FIGURES):
        starts, ends = ([life[end][place] for life in soak.lives] for end in (0, 1))
        if starts:
            most = max(b - a for a, b in zip(starts, ends, strict=True))
            print(f"{name}: at most {max(starts):.0f} after 30 steps, {max(ends):.0f} at the end, {most:.0f} more")
    print("wrong:", soak.wrong or "nothing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=None)
    given = parser.parse_args()
    folder = given.workdir or Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder.resolve(), given.seed)
    soak.workdir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(soak.workdir)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        run(soak, time.monotonic() + 3600 * given.hours, mounted)
    finally:
        if soak.process and soak.process.poll() is None:
            os.killpg(soak.process.pid, signal.SIGKILL)
            soak.process.wait()
        report(soak)
        if mounted:
            subprocess.run(["umount", "-l", str(soak.workdir)])
    return 1 if soak.wrong or soak.lost else 0


if __name__ == "__main__":
    sys.exit(main())
