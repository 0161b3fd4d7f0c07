"""A real Slurm on this machine: four nodes with daemons, ports, munge and folders of their own."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

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
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.[1-4] Port={port_1}-{port_4} CPUs=4 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class Slurm:
    """Runs Slurm's commands on the cluster of the tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf")}
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
        if self._daemons:
            self.run("scancel", f"--user={getpass.getuser()}")
            self.run("scancel", "--signal=KILL", f"--user={getpass.getuser()}")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command, **options) -> subprocess.CompletedProcess:
        return subprocess.run(list(map(str, command)), env=self.environment, capture_output=True, text=True, **options)

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    def _daemon(self, *command) -> None:
        log = (self.folder / f"{command[0]}-out.log").open("a")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )


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


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if missing := [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]:
        pytest.skip(f"needs a Slurm of its own: {', '.join(missing)} not found (apt install slurm-wlm munge)")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
