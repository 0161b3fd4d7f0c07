"""Which process of a job this is, and where the others are: from Slurm or another launcher, or from flags."""

import atexit
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel import accelerators
from vit_nabirds.parallel.group import ProcessGroup, split_address
from vit_nabirds.parallel.meeting import NODE, is_loopback

log = logging.getLogger("vit_nabirds")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "dm-pix", "orbax-checkpoint", "numpy")  # they change results


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
    """A line for the user whose one process is in an allocation for several."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" not in environ or tasks == "1":
        return None
    return f"this allocation has {tasks} tasks, but srun did not start this process as one of them: it works alone"


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    allow_idle: bool = False,
) -> ProcessGroup:
    """The group of this job's processes, given here or by a launcher; a group of one without either.

    UserError if they do not all meet within `timeout` seconds, or if a GPU would be shared or idle.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    launch = launched(coordinator=coordinator) if None in given.values() else None
    if any(value is not None for value in given.values()):
        given = {name: getattr(launch, name, None) if value is None else value for name, value in given.items()}
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise ConfigError(f"a process of several that srun did not start needs {' and '.join(missing)} too.")
        launch = Launch(**given)
    seen = accelerators.see(NODE)
    unused = accelerators.check_plugin(seen.gpus)
    if launch is None:
        for line in filter(None, [why_alone(), unused]):
            log.warning("%s", line)
        return ProcessGroup()
    address = split_address(launch.coordinator, launch.num_processes, launch.process_id)
    group = ProcessGroup(launch.process_id, launch.num_processes)
    own = group.meet(*address, timeout, seen, functools.partial(accelerators.share, allow_idle=allow_idle))
    try:
        if unused and not allow_idle:
            raise UserError(f"{unused[:-1]}, or pass --allow_idle_gpus.")
        _initialize_jax(launch, group, own)
    except Exception as error:
        group.fail_with(error)
    return group


def _initialize_jax(launch: Launch, group: ProcessGroup, own: list[int] | None) -> None:
    """Connect the group's JAX runtimes, before JAX touches a device. `own`: of the GPUs that it sees; None: all."""
    import jax

    # Its handler of SIGTERM would replace ours; the processes agree on the step to stop at by `devices.any_process`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        launch.coordinator,
        launch.num_processes,
        launch.process_id,
        local_device_ids=own,
        coordinator_bind_address=launch.coordinator if is_loopback(launch.coordinator.rpartition(":")[0]) else None,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=24 * 3600,  # its end is a dump; ours (group.py, watchdog.py) has a message
    )
    absl = logging.getLogger("absl")
    absl.handlers, absl.propagate = [_FailOnOrbaxError(group)], False
    absl.setLevel(logging.ERROR)
    atexit.register(group.leave)  # the last registered is the first to run: before JAX leaves


class _FailOnOrbaxError(logging.Handler):
    """Ends the job when a thread of Orbax logs its failure: the other processes would wait a long time."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(logging.ERROR)
        self._group = group

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self._group.fail_with(record.exc_info[1])


def check_same_program(group: ProcessGroup, configuration: dict) -> None:
    """UserError in a process with other code, packages or configuration (by dotted name) than process 0."""
    if group.num_processes == 1:
        return
    package = Path(__file__).parent.parent
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(package.rglob("*.py"))))
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    environment = packages | {"python": platform.python_version(), "vit_nabirds": code.hexdigest()[:12]}
    group.agree("the environment", environment, "Use one environment and one checkout on storage that all share.")
    # The data may lie elsewhere on each node; their fingerprints are compared.
    values = {f"config.{name}": value for name, value in configuration.items() if name != "data.root"}
    group.agree("the configuration", values, "Start all processes with the same command.")
