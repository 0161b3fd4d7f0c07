"""How a process joins the others of its job: they meet, share the GPUs, connect JAX, and run the same program."""

import atexit
import functools
import hashlib
import importlib.metadata
import logging
import platform
from pathlib import Path

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel import accelerators
from vit_nabirds.parallel.group import ProcessGroup, split_address
from vit_nabirds.parallel.launchers import Launch, launched, why_alone
from vit_nabirds.parallel.meeting import NODE, is_loopback

log = logging.getLogger("vit_nabirds")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "dm-pix", "orbax-checkpoint", "numpy")  # they change results


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
