"""Which process of a job this is, and where the others are, by what Slurm or another launcher says."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vit_nabirds.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process of several."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int


class Names(NamedTuple):
    """The variables in which a launcher says which process of how many this is, how many run on its node, and where
    process 0 listens."""

    process_id: str
    num_processes: str
    on_node: str = ""
    host: str = ""
    port: str = ""


LAUNCHERS = {
    "mpirun": Names("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    "mpiexec": Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    "torchrun": Names("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "Kubernetes": Names("PROCESS_ID", "NUM_PROCESSES", "", "COORDINATOR_ADDRESS", "COORDINATOR_PORT"),  # a JAXJob
}
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_PROCID")
_SAY_WHERE = "say where process 0 is: --coordinator=HOST:PORT, or MASTER_ADDR in the environment of all processes."


def launched(environ: Mapping[str, str] = os.environ, coordinator: str | None = None) -> Launch | None:
    """What the environment says about this process; None if it is not one of several that a launcher started.

    `coordinator` is where process 0 listens, if the user has said so. mpirun and torchrun come first: srun may have
    started them. ConfigError for half an environment.
    """
    found = launched_by_slurm(environ, coordinator)
    for launcher, names in LAUNCHERS.items():
        place = [environ.get(name) for name in names[:2]]
        if None in place or place[1] == "1" or not all(map(str.isdecimal, place)):
            continue
        process_id, num_processes = map(int, place)
        if found and (found.process_id, found.num_processes) == (process_id, num_processes):
            return found  # srun has said it in the words of MPI too
        return Launch(coordinator or _coordinator(launcher, names, environ), num_processes, process_id)
    if found is None and "PMIX_RANK" in environ and not {"SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE"} & environ.keys():
        raise ConfigError(
            "an MPI launcher has started this process (PMIX_RANK), but does not say how many there are: give "
            "--num_processes, --process_id and --coordinator=HOST:PORT."
        )
    return found


def launched_by_slurm(environ: Mapping[str, str], coordinator: str | None = None) -> Launch | None:
    """What Slurm says about this task; None if it is not one of several tasks that srun started."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or _is_interactive(environ):
        return None
    if environ.get("SLURM_HET_SIZE", "1") != "1":
        raise ConfigError(
            "this is a heterogeneous job (SLURM_HET_SIZE), whose parts count their tasks apart: submit a job of equal "
            "nodes."
        )
    if missing := [name for name in _SLURM if not environ.get(name)]:
        raise ConfigError(
            f"srun has started {tasks} tasks (SLURM_STEP_NUM_TASKS), but {missing[0]} is missing in the environment: "
            "pass all of SLURM_* on, or unset SLURM_STEP_NUM_TASKS to train in one process."
        )
    try:
        # Steps of one job that share a node get different ports, above those that the kernel hands out.
        port = 61440 + (7 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])) % 4096
        port = environ.get("JAX_COORDINATOR_PORT", port)
        return Launch(coordinator or f"{first_host(environ)}:{port}", int(tasks), int(environ["SLURM_PROCID"]))
    except ValueError as error:
        raise ConfigError(
            f"a number in the environment of Slurm is none ({error}): start the tasks with srun."
        ) from None


def first_host(environ: Mapping[str, str]) -> str:
    """The node of task 0, of 'gpu[007-009,12],login1' the first, but with --distribution=arbitrary that of the file."""
    if environ["SLURM_STEP_NUM_NODES"] == "1":
        return "127.0.0.1"
    if environ.get("SLURM_DISTRIBUTION") == "arbitrary":
        try:
            return Path(environ["SLURM_HOSTFILE"]).read_text().split()[0].split("*")[0]
        except (KeyError, OSError, IndexError):
            raise ConfigError(f"with --distribution=arbitrary nothing but SLURM_HOSTFILE, {_SAY_WHERE}") from None
    return re.sub(r"\[(\w+)[^]]*]", r"\1", environ["SLURM_STEP_NODELIST"]).split(",")[0]


def _is_interactive(environ: Mapping[str, str]) -> bool:
    """Whether the user has typed the command in the shell that `srun --pty` has opened as the first of its tasks."""
    return "SLURM_PTY_PORT" in environ and sys.stdin is not None and sys.stdin.isatty()


def _coordinator(launcher: str, names: Names, environ: Mapping[str, str]) -> str:
    """HOST:PORT of process 0."""
    host, port = environ.get(names.host or "MASTER_ADDR"), environ.get(names.port or "MASTER_PORT")
    if host is None and environ.get(names.on_node) == environ[names.num_processes]:
        host = "127.0.0.1"
    if host is None:
        raise ConfigError(
            f"{launcher} has started {environ[names.num_processes]} processes on several nodes: {_SAY_WHERE}"
        )
    if port is None:  # all processes of a node have one parent; on several nodes they need a port that is fixed
        port = 61440 + (os.getppid() % 4096 if host == "127.0.0.1" else 0)
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself listens on its port
        port = int(port) + 1
    return f"{host}:{environ.get('JAX_COORDINATOR_PORT', port)}"


def processes_of_first_node(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes of this job run on the node of process 0; 1 where no launcher says more."""
    for names in LAUNCHERS.values():
        if environ.get(names.on_node, "").isdecimal() and environ.get(names.num_processes, "1") != "1":
            return int(environ[names.on_node])
    # '2(x3),1': two tasks on each of three nodes and one on the fourth
    first = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return int(first[0]) if first and not _is_interactive(environ) else 1


def why_alone(environ: Mapping[str, str] = os.environ) -> str | None:
    """A line for the user whose one process is in an allocation for several, or has half of a launcher's words."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if environ.get("SLURM_HET_SIZE", "1") != "1":
        return "this is one task of a heterogeneous job (SLURM_HET_SIZE): it works alone"
    if "SLURM_JOB_ID" not in environ or tasks == "1":
        for launcher, names in LAUNCHERS.items():
            said, missing = sorted(names[:2], key=lambda name: name not in environ)
            if said in environ and missing not in environ:
                return f"{said} is set, as by {launcher}, but {missing} is not: this process works alone"
        return None
    return f"this allocation has {tasks} tasks, but srun did not start this process as one of them: it works alone"
