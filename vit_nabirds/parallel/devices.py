"""Devices, the mesh they form, and what goes to them."""

import contextlib
import functools
import os
import resource
import socket
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_nabirds.errors import ConfigError, TransientError, UserError, exit_code_of, quoted, shown
from vit_nabirds.parallel.launchers import processes_of_first_node
from vit_nabirds.parallel.sharding import AXES


def split_cpu(devices: int) -> None:
    """Let the CPU count as several devices where there is no accelerator, unless JAX has been used in this process."""
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not in_flags and jax.config.jax_num_cpu_devices != devices:
        with contextlib.suppress(RuntimeError):  # in a notebook; any number of devices gives the same result
            jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of all processes) as `data` x `fsdp`, those of a process side by side.

    `fsdp` -1 stands for all devices of a node. ConfigError if the devices cannot be split like that.
    """
    tasks = processes_of_first_node() if devices is None else 1  # taken to be those of every node
    devices = sorted(all_devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if fsdp == -1:
        fsdp = tasks * sum(device.process_index == devices[0].process_index for device in devices)
    if len(devices) % fsdp:
        raise ConfigError(
            f"config.mesh.fsdp is {fsdp}, but there are {len(devices)} devices: choose a divisor of that."
        )
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def all_devices() -> list[jax.Device]:
    """Of all processes; UserError where JAX cannot use those that JAX_PLATFORMS or the machine asks for."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # some versions assert that there is a device
        reason = f" ({quoted(error)})" if str(error) else ""
        if "gloo" in reason:
            raise UserError(
                f"this machine's name, {shown(socket.gethostname())}, has no address that the processes could use to "
                f"talk to each other: give it one in /etc/hosts{reason}."
            ) from error
        if not (asked := os.environ.get("JAX_PLATFORMS")):
            raise
        kind = TransientError if exit_code_of(error) == TransientError.exit_code else UserError
        raise kind(
            f"JAX_PLATFORMS is {shown(asked)}, but JAX finds no such device{reason}: see whether the driver does "
            "(nvidia-smi), install JAX's plug-in for it (BUILD.md), or unset JAX_PLATFORMS to use what there is."
        ) from error


def own(mesh: Mesh) -> jax.Device:
    """The first device of this process in the mesh."""
    return next(device for device in mesh.devices.flat if device.process_index == jax.process_index())


def most_memory() -> int:
    """Bytes: the most that was taken so far on a device of this process; without accelerators, by the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return (
        max(x.get("peak_bytes_in_use", 0) for x in stats) or _RSS * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


_RSS = 1 if sys.platform == "darwin" else 1024  # bytes in the system's unit


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Shards the first axis."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The same array of every process -> one copy on each device."""
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda _: array)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's block of a batch -> arrays of the global batch, sharded over all devices."""
    sharding = over_batch(mesh)
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
