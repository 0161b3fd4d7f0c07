"""The state of a training, in few arrays: JAX's host time at each step is 8 µs for every one of them."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax


def initial(
    params: dict[str, jax.Array],
    tx: optax.GradientTransformation,
    groups: dict[str, list[str]],
    trained: Collection[str],
) -> dict:
    """The state before the first step, of parameters by path; `trained` are the names of `groups` that are."""
    packed = pack(params, groups)
    opt_state = tx.init({name: packed[name] for name in trained})
    return {"step": jnp.zeros((), jnp.int32), "params": packed, "opt_state": opt_state}


def group(paths: Collection[str], shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, list[str]]:
    """Which parameters share an array, by the path of the first: the small ones of the layers that have one shape.

    Kernels have arrays of their own, for stacking would copy them at every step.
    """
    groups, firsts = {}, {}
    for path in paths:
        small = path.startswith("encoder/") and not path.endswith("/kernel")
        groups.setdefault(firsts.setdefault(shapes[path].shape, path) if small else path, []).append(path)
    return groups


def pack(params: dict[str, jax.Array], groups: dict[str, list[str]]) -> dict[str, jax.Array]:
    """Parameters by path -> by the names of `groups`, those of one group stacked."""
    return {
        name: params[name] if len(paths) == 1 else jnp.stack([params[path] for path in paths])
        for name, paths in groups.items()
    }


def unpack(packed: dict[str, jax.Array], groups: dict[str, list[str]]) -> dict[str, jax.Array]:
    """The inverse of `pack`."""
    params = {}
    for name, paths in groups.items():
        params |= {name: packed[name]} if len(paths) == 1 else zip(paths, jnp.unstack(packed[name]), strict=True)
    return params
