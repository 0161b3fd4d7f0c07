"""Which process of a job this is, where the others are and which GPUs it has: from Slurm, or from flags."""

import atexit
import dataclasses
import glob
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.group import NODE, ProcessGroup, split_address

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "dm-pix", "orbax-checkpoint", "numpy")  # they change results


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process of several. `local_device_ids` None: every device that it sees is its own."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def launched_by_slurm(environ: Mapping[str, str] = os.environ, gpus: int | None = None) -> Launch | None:
    """What Slurm says about this task; None if it is not one of several tasks that srun started.

    `gpus` is the number of the node's GPUs when CUDA_VISIBLE_DEVICES does not say which are the task's.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    # Steps of one job that share a node get different ports, above those that the kernel hands out.
    port = 61440 + (7 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])) % 4096
    port = environ.get("JAX_COORDINATOR_PORT", port)
    nodes = environ["SLURM_STEP_NODELIST"]  # like 'gpu[007-009,12],login1'
    first = re.sub(r"\[(\w+)[^]]*]", r"\1", nodes).split(",")[0]
    host = first if int(environ["SLURM_STEP_NUM_NODES"]) > 1 else "127.0.0.1"
    return Launch(
        f"{host}:{port}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
        _gpus_of_task(environ, len(glob.glob("/dev/nvidia[0-9]*")) if gpus is None else gpus),
    )


def tasks_by_node(environ: Mapping[str, str] = os.environ) -> list[int]:
    """How many tasks of this job step run on each node; [1] without Slurm."""
    # '2(x3),1': two tasks on each of three nodes and one on the fourth
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]


def _gpus_of_task(environ: Mapping[str, str], gpus: int) -> list[int] | None:
    """Indices of a task's GPUs among those it sees; None when they are all its own."""
    tasks = tasks_by_node(environ)[int(environ["SLURM_NODEID"])]
    if "CUDA_VISIBLE_DEVICES" in environ:
        gpus = len([name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name])
    # With --gpus-per-task (a number, or 'h100:1') Slurm shows each task its own GPUs alone, or those of all tasks.
    own = int(environ.get("SLURM_GPUS_PER_TASK", "1").split(":")[-1])
    if tasks == 1 or gpus in (0, own):
        return None
    if gpus % tasks:
        raise UserError(
            f"{tasks} tasks cannot share the {gpus} GPUs of {NODE} equally: start one task for each "
            f"GPU (--ntasks-per-node={gpus}) or for each node (--ntasks-per-node=1)."
        )
    share, local = gpus // tasks, int(environ["SLURM_LOCALID"])
    return list(range(local * share, (local + 1) * share))


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: int = 45
) -> ProcessGroup:
    """The group of this job's processes, given here or by Slurm; a group of one without either.

    UserError if they do not all meet within `timeout` seconds.
    """
    launch = launched_by_slurm()
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        given = {name: getattr(launch, name, None) if value is None else value for name, value in given.items()}
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise ConfigError(f"a process of several that srun did not start needs {' and '.join(missing)} too.")
        launch = Launch(**given, local_device_ids=launch.local_device_ids if launch else None)
    if launch is None:
        return ProcessGroup()
    address = split_address(launch.coordinator, launch.num_processes, launch.process_id)
    group = ProcessGroup(launch.process_id, launch.num_processes)
    group.meet(*address, timeout)
    try:
        _initialize_jax(launch, group)
    except Exception as error:
        group.fail_with(error)
    return group


def _initialize_jax(launch: Launch, group: ProcessGroup) -> None:
    """Connect the group's JAX runtimes, before JAX touches a device."""
    import jax

    # Its handler of SIGTERM would replace ours; the processes agree on the step to stop at by `devices.any_process`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        launch.coordinator,
        launch.num_processes,
        launch.process_id,
        local_device_ids=launch.local_device_ids,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=60,
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
