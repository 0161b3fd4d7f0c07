"""The start of a job of several processes: which this one is, where the others are, and which devices are its own."""

import atexit
import dataclasses
import glob
import logging
import os
import re
from collections.abc import Mapping

import jax

from vit_nabirds.errors import UserError
from vit_nabirds.parallel import link
from vit_nabirds.parallel.link import NODE

START_TIMEOUT = 45  # seconds for all processes to meet


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those of a job; `local_device_ids` None: all devices that it sees."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def place_in_slurm(environ: Mapping[str, str] = os.environ, gpus: int | None = None) -> Place | None:
    """The place that Slurm gave this task; None when it is not one of several tasks that srun started.

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
    return Place(
        f"{host}:{port}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
        _devices_of_task(environ, len(glob.glob("/dev/nvidia[0-9]*")) if gpus is None else gpus),
    )


def _devices_of_task(environ: Mapping[str, str], gpus: int) -> list[int] | None:
    """Indices of a task's GPUs among those it sees; None when they are all its own."""
    # '2(x3),1': two tasks on each of three nodes and one on the fourth
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
    tasks = [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))][int(environ["SLURM_NODEID"])]
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
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = START_TIMEOUT,
) -> None:
    """Meet the other processes of the job: as said here, else as Slurm says; without either this one is alone.

    UserError when they do not meet within `timeout` seconds.
    """
    place = place_in_slurm()
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        given = {name: getattr(place, name, None) if value is None else value for name, value in given.items()}
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise UserError(f"a process of several that srun did not start needs {' and '.join(missing)} too.")
        place = Place(**given, local_device_ids=place.local_device_ids if place else None)
    if place:
        port = re.fullmatch(r".+:(\d+)", place.coordinator)
        if not port or not 0 < int(port[1]) < 2**16 or place.process_id >= place.num_processes:
            raise UserError(
                f"--coordinator={place.coordinator} --num_processes={place.num_processes} "
                f"--process_id={place.process_id} is no place: HOST:PORT of process 0, and numbers from 0 on."
            )
        start(place, timeout)


class _EndOfOrbax(logging.Handler):
    """Ends the job when a thread of Orbax has logged its failure, for which the other processes would wait for long."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            link.fail_with(record.exc_info[1])


def start(place: Place, timeout: int = START_TIMEOUT) -> None:
    """Join the other processes of the job, before JAX touches a device; UserError after `timeout` seconds."""
    link.meet(place.coordinator, place.num_processes, place.process_id, timeout)
    # Its handler of SIGTERM would replace ours; `any_process` has the agreement on the step to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=60,
    )
    absl = logging.getLogger("absl")
    absl.handlers, absl.propagate = [_EndOfOrbax(logging.ERROR)], False
    absl.setLevel(logging.ERROR)
    atexit.register(link.part)  # the last registered is the first to run: before JAX's parting
