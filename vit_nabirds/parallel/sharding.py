"""How parameters lie on the mesh `data` x `fsdp`: split over the devices of `fsdp`, whole again while a stage works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXES = ("data", "fsdp")  # a batch is split over both


def spec_of(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the longest axis that so many devices can share; vectors stay whole: they are small."""
    shared = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or sum(length > 1 for length in shape) < 2 or not shared:
        return PartitionSpec()
    longest = max(shared, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "fsdp")


def layout(tree: object, mesh: jax.sharding.Mesh) -> object:
    """The sharding of each array, by its shape alone: of parameters, their moments and averages alike."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x.shape, mesh.shape["fsdp"])), tree)


def laid_out(tree: object, mesh: jax.sharding.Mesh) -> object:
    """The shapes of arrays, each with its sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout(tree, mesh))


def spread(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """The same array of every process -> each device's part of it."""
    return jax.make_array_from_callback(array.shape, layout(array, mesh), lambda index: array[index])


def split_axis(x: jax.Array, whole: tuple[int, ...]) -> int | None:
    """The axis along which a device's part of an array of shape `whole` is cut; None: it has all of it."""
    return next((axis for axis, (part, all_) in enumerate(zip(x.shape, whole, strict=True)) if part != all_), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(part: jax.Array, axis: int, dtype: str, sum_dtype: str) -> jax.Array:
    """The parts of all devices of `fsdp`, put together along an axis, in `dtype`.

    Its gradient is this device's part of the mean over these devices, added up in `sum_dtype` (ZeRO-3: Rajbhandari et
    al., 2020).
    """
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forwards(part: jax.Array, axis: int, dtype: str, sum_dtype: str) -> tuple[jax.Array, None]:
    return gather(part, axis, dtype, sum_dtype), None


def _gather_backwards(axis: int, dtype: str, sum_dtype: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    summed = jax.lax.psum_scatter(gradient.astype(sum_dtype), "fsdp", scatter_dimension=axis, tiled=True)
    return (summed.astype(jnp.float32) / jax.lax.axis_size("fsdp"),)


gather.defvjp(_gather_forwards, _gather_backwards)
