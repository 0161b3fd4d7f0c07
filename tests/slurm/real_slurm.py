"""A real Slurm on this machine: four nodes, with daemons, ports, munge and a folder of their own."""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_nabirds.runs.metrics import read_metrics

os.environ["PATH"] += ":/usr/sbin:/sbin"  # where the daemons are
NEEDED = ("slurmctld", "slurmd", "munged", "mungekey", "srun")
# The names of the nodes are addresses of the loopback device, so that each resolves without an entry in /etc/hosts.
NODES = "127.0.0.[1-4]"
CONFIGURATION = """
ClusterName=vit-nabirds-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=20
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.[1-4] Port={port_1}-{port_4} CPUs=4 RealMemory=64000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


REPOSITORY = Path(__file__).parents[2]
TINY, EVERYTHING = (f"--config={REPOSITORY / 'tests' / name}_config.py" for name in ("tiny", "everything"))
# One device for each task, and programs that are compiled fast rather than well.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Slurm:
    """Starts daemons, and runs Slurm's commands on their cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "XLA_FLAGS": XLA_FLAGS, "VENV": sys.prefix}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o755)
        key, munge = self.folder / "munge.key", self.folder / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        paths = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        paths["seed-file"] = munge / "seed"
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
        port = free_ports(5)
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, host=host, user=getpass.getuser(), nodes=NODES,
                port=port, port_1=port + 1, port_4=port + 4,
            )
        )  # fmt: skip
        wait_until(lambda: (munge / "socket").exists(), 10, "munged does not start")
        self._daemon("slurmctld", "-D")
        for node in range(1, 5):
            self._daemon("slurmd", "-D", "-N", f"127.0.0.{node}")
        wait_until(lambda: self.run("sinfo", "-h", "-o", "%D %T").stdout.split() == ["4", "idle"], 60, self.logs)

    def stop(self) -> None:
        self.run("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + 40  # longer than KillWait
        while self.run("squeue", "--noheader").stdout and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in Path("/proc").glob("[0-9]*"):  # steps that have lost their daemon
            with contextlib.suppress(OSError):
                if f"SLURM_CONF={self.folder}/" in (process / "environ").read_text(errors="replace"):
                    os.kill(int(process.name), signal.SIGKILL)

    def run(self, *command, **options) -> subprocess.CompletedProcess:
        return subprocess.run(list(map(str, command)), env=self.environment, capture_output=True, text=True, **options)

    def srun(self, nodes: int, tasks: int, *command, **options) -> subprocess.CompletedProcess:
        layout = (f"--nodes={nodes}", f"--ntasks={tasks}", "--kill-on-bad-exit=0", "--wait=30")
        return self.run("srun", *layout, *command, timeout=180, **options)

    def train(self, nodes: int, tasks: int, *arguments) -> subprocess.CompletedProcess:
        return self.srun(nodes, tasks, sys.executable, REPOSITORY / "main.py", "train", *arguments)

    def submit(self, *arguments) -> "Job":
        submitted = self.run(*arguments, cwd=REPOSITORY)
        assert submitted.returncode == 0, submitted.stderr
        return Job(self, submitted.stdout.split()[-1])

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def _daemon(self, *command) -> None:
        log = (self.folder / f"{command[0]}-out.log").open("a")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )


class Job:
    """A job in the queue."""

    def __init__(self, slurm: Slurm, number: str):
        self.slurm, self.number = slurm, number

    def __getitem__(self, field: str) -> str:
        """A field of `scontrol show job`, like JobState or Restarts."""
        shown = self.slurm.run("scontrol", "show", "job", "--oneliner", self.number).stdout
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)[field]

    def wait(self, seconds: float) -> str:
        """Its state at its end."""
        wait_until(lambda: self["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds, self.log)
        return self["JobState"]

    def log(self) -> str:
        file = Path(self["StdOut"])
        return file.read_text() if file.exists() else ""

    def processes(self) -> list[int]:
        """The training's processes, in the order of their ranks."""
        ranks = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = dict(x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x)
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if environment.get("SLURM_JOB_ID") == self.number and "SLURM_STEP_NUM_TASKS" in environment:
                    if "slurmstepd" in (folder.parent / str(parent) / "comm").read_text():
                        ranks[int(environment["SLURM_PROCID"])] = int(folder.name)
        return [ranks[rank] for rank in sorted(ranks)]


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(17000, 32000, 16):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


def wait_until(condition, seconds: float, otherwise="it takes too long") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(otherwise() if callable(otherwise) else otherwise)
        time.sleep(0.2)


def last_step(workdir: Path) -> int:
    """The newest step that a run has logged."""
    return max((line["step"] for line in read_metrics(workdir / "metrics.jsonl")), default=0)
