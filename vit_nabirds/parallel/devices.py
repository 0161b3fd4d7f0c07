"""Devices, the mesh they form, and what goes to them."""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def split_cpu(devices: int) -> None:
    """Let the CPU count as several devices where there is no accelerator, unless JAX has been used in this process."""
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not in_flags and jax.config.jax_num_cpu_devices != devices:
        with contextlib.suppress(RuntimeError):  # in a notebook; any number of devices gives the same result
            jax.config.update("jax_num_cpu_devices", devices)


def make_mesh() -> Mesh:
    """All devices of all processes on the one axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def own(mesh: Mesh) -> jax.Device:
    """The first device of this process in the mesh."""
    return next(device for device in mesh.devices.flat if device.process_index == jax.process_index())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Shards the first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The same array of every process -> one copy on each device."""
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda _: array)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's block of a batch -> arrays of the global batch, sharded on `data`."""
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
