"""The processes of a job: how they find each other and their devices, agree, and fail together."""

import atexit
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # for its key-value store, which has no public name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_nabirds.config import flat
from vit_nabirds.errors import UserError

START_TIMEOUT = 45  # seconds for all processes to meet
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "dm-pix", "orbax-checkpoint", "numpy")  # that move results
NODE = os.environ.get("SLURMD_NODENAME", socket.gethostname())
JOB = f"{os.environ.get('SLURM_JOB_ID', 'none')}.{os.environ.get('SLURM_STEP_ID', 'none')}"
FAILURE = "vit_nabirds/failure"  # key in the coordinator's store: which process failed first
LONG = 24 * 3600 * 1000  # milliseconds; a peer that fails meanwhile ends the wait


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
    nodes = environ["SLURM_STEP_NODELIST"]  # like 'gpu[007-009,12],login1'
    first = re.sub(r"\[(\w+)[^]]*]", r"\1", nodes).split(",")[0]
    host = first if int(environ["SLURM_STEP_NUM_NODES"]) > 1 else "127.0.0.1"
    return Place(
        f"{host}:{environ.get('JAX_COORDINATOR_PORT', port)}",
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
        if not re.fullmatch(r".+:\d+", given["coordinator"]) or given["process_id"] >= given["num_processes"]:
            raise UserError(
                f"--coordinator={given['coordinator']} --num_processes={given['num_processes']} "
                f"--process_id={given['process_id']} is no place: HOST:PORT of process 0, and numbers from 0 on."
            )
        place = Place(**given, local_device_ids=place.local_device_ids if place else None)
    if place:
        start(place, timeout)


def start(place: Place, timeout: int = START_TIMEOUT) -> None:
    """Join the other processes of the job, before JAX touches a device; UserError after `timeout` seconds."""
    host, _, port = place.coordinator.rpartition(":")
    if place.process_id == 0:
        _wait_for_others(place.num_processes, int(port), timeout)
    else:
        _report_to_first(place.process_id, host, int(port), timeout)
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
    ended = threading.Event()
    watcher = threading.Thread(target=_end_with_the_first, args=[ended], daemon=True)
    watcher.start()
    atexit.register(watcher.join)
    atexit.register(ended.set)  # the last registered is the first to run


# Before JAX's own meeting, which ends in a stack trace when one is missing, the processes meet on the same port.
def _wait_for_others(num_processes: int, port: int, timeout: float) -> None:
    deadline, come = time.monotonic() + timeout, {}
    ipv6 = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
    try:
        server = socket.create_server(("", port), backlog=num_processes, **ipv6)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of {NODE} ({error.strerror}): choose a free one with "
            "JAX_COORDINATOR_PORT, or --coordinator=HOST:PORT."
        ) from None
    with server:
        while len(come) < num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                connection, _ = server.accept()
                connection.settimeout(5)
                job, number = connection.recv(100).decode().split()
                if job == JOB:
                    come[int(number)] = connection
        missing = [str(number) for number in range(1, num_processes) if number not in come]
        for connection in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"wait" if missing else b"go")
            connection.close()
    if missing:
        raise UserError(
            f"of {num_processes} processes, {', '.join(missing)} did not come to process 0 on {NODE}, port {port}, "
            f"within {timeout:.0f} s: look above for why they ended; give slow ones more time with --start_timeout."
        )


def _report_to_first(process_id: int, host: str, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        raise UserError(
            f"{NODE} cannot resolve {host!r}, the host of process 0: give an address that all nodes can reach with "
            "--coordinator=ADDRESS:PORT."
        ) from None
    answer, problem = b"", "it ended"
    while not answer and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(f"{JOB} {process_id}".encode())
                connection.settimeout(timeout + 5)
                answer = connection.recv(10)
        except OSError as error:
            problem = error
        time.sleep(0.1)
    if answer == b"wait":
        os._exit(1)  # others are missing; process 0 says which
    if not answer:
        raise UserError(
            f"{NODE} got no answer from process 0 at {host}:{port} within {timeout:.0f} s ({problem}): look above for "
            "why process 0 ended; if it did not, the port is closed between the nodes or used by another job (choose "
            "one with JAX_COORDINATOR_PORT), or it starts slowly (--start_timeout)."
        )


def process_id() -> int:
    """This process's number, also before JAX has touched a device."""
    return distributed.global_state.process_id


def is_writer() -> bool:
    """Whether this process is the one that writes logs, events and configuration."""
    return process_id() == 0


def is_alone() -> bool:
    return distributed.global_state.client is None


def wait_for_all(name: str) -> None:
    """Go on when all processes have come to the point of this name."""
    if not is_alone():
        distributed.global_state.client.wait_at_barrier(f"vit_nabirds/{name}", LONG)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """The other processes enter when the writer has left: it makes or fetches what all then read."""
    if not is_writer():
        wait_for_all(name)
    yield
    if is_writer():
        wait_for_all(name)


def check_same_program(config: dict) -> None:
    """Raise UserError in a process that runs other code, other packages or another configuration than process 0."""
    if is_alone():
        return
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    environment = packages | {"python": platform.python_version(), "vit_nabirds": code.hexdigest()[:12]}
    check_agreement("the environment", environment, "Use one environment and one checkout on storage that all share.")
    # The data may lie elsewhere on each node; their fingerprints are compared.
    fields = {f"config.{field}": value for field, value in flat(config).items() if field != "data.root"}
    check_agreement("the configuration", fields, "Start all processes with the same command.")


def check_agreement(name: str, mine: dict, remedy: str) -> None:
    """Raise UserError in a process whose values differ from those of process 0; no process goes on before all agree."""
    if is_alone():
        return
    client, key = distributed.global_state.client, f"vit_nabirds/{name}"
    mine = json.loads(json.dumps(mine))
    if is_writer():
        client.key_value_set(key, json.dumps(mine))
    else:
        first = json.loads(client.blocking_key_value_get(key, LONG))
        differing = [field for field in sorted(first | mine) if first.get(field) != mine.get(field)]
        if differing:
            what = "; ".join(f"{x} is {mine.get(x)!r} here and {first.get(x)!r} there" for x in differing[:5])
            raise UserError(f"{name} differs from that of process 0: {what}. {remedy}")
    wait_for_all(f"{name} agreed")


def check_shared(file: Path) -> None:
    """Raise UserError in a process that cannot see what the writer has written."""
    wait_for_all(f"{file} written")
    for _ in range(100):  # network file systems take a moment
        if file.exists():
            return
        time.sleep(0.1)
    raise UserError(f"{file.parent} is not the same folder on all nodes: give a --workdir on storage that they share.")


def fail(message: str, code: int) -> NoReturn:
    """Show the message and end all processes of the job; of several that fail, the first one's is shown."""
    client, is_first = distributed.global_state.client, True
    if client:
        state = distributed.global_state
        message = f"process {state.process_id} of {state.num_processes} on {NODE}: {message}"
        try:
            client.key_value_set(FAILURE, message)
        except jax.errors.JaxRuntimeError as error:
            is_first = "ALREADY_EXISTS" not in str(error)
    if is_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if client and is_writer():
        time.sleep(2)  # the others hear of it from this process
    if client:
        os._exit(code)  # what JAX does at exit would wait for the others
    sys.exit(code)


def _end_with_the_first(ended: threading.Event) -> None:
    """Look for the news that a process has failed, and end: it has said why."""
    while not ended.wait(0.5):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such news
            distributed.global_state.client.key_value_try_get(FAILURE)
            if is_writer():
                time.sleep(1)  # the others hear of it from this process
            os._exit(1)


def end_unless_told(_type, error: BaseException | None, _traceback) -> None:
    """An exit callback: after an error that nobody foresaw, do not wait for the other processes in clean-up."""
    if error is not None and not is_alone() and not isinstance(error, UserError | OSError):
        fail_unexpectedly(error)


def fail_unexpectedly(error: BaseException) -> NoReturn:
    """End after an error that may be the consequence of another process's, whose message then is the one to show."""
    if is_alone():
        raise error
    time.sleep(3)  # `_end_with_the_first` ends this process if another has failed
    if re.search(r"gloo|nccl|coordination|heartbeat|closed by peer", str(error), re.IGNORECASE):
        fail(
            f"another process was lost without a word, killed or out of memory ({_first_line(error)}): see what srun "
            "says of it, or `sacct -j JOB`. The same command goes on from the last checkpoint.",
            1,
        )
    fail("".join(traceback.format_exception(error)), 1)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def split_cpu(devices: int) -> None:
    """Let the CPU count as several devices where there is no accelerator; before JAX touches a device."""
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not in_flags and jax.config.jax_num_cpu_devices != devices:
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh() -> Mesh:
    """All devices of all processes on the one axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's block of a batch -> arrays of the global batch, sharded on `data`."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, block) for name, block in batch.items()}


def any_process(mesh: Mesh, *flags: bool) -> np.ndarray | jax.Array:
    """For each flag whether any process raises it: computed on the devices, in turn with their other work."""
    if jax.process_count() == 1:
        return np.array(flags)
    array, maximum = _flags(mesh, flags)
    return maximum(array)


@functools.cache
def _flags(mesh: Mesh, flags: tuple[bool, ...]) -> tuple:
    rows = np.tile(np.array(flags, np.int32), (jax.local_device_count(), 1))
    return to_devices({"flags": rows}, mesh)["flags"], _maximum(mesh)


@functools.cache
def _maximum(mesh: Mesh):
    return jax.jit(lambda rows: jnp.max(rows, axis=0), out_shardings=replicated(mesh))
