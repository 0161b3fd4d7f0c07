"""What each platform computes in its own way, as one value that the transformer takes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_nabirds.models import cpu


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(query keyᵀ / √width) value; all (batch, tokens, heads, width)."""
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def gpu_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The same by cuDNN, where it can: not for the last block, which has fewer queries than keys."""
    flash = query.shape == key.shape and _has_flash_attention(query.dtype, query.shape[-1])
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if flash else "xla")


@functools.cache
def _has_flash_attention(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN's attention and its gradient compile here: for bfloat16, on GPUs since Ampere."""
    x = jax.ShapeDtypeStruct((1, 17, 2, width), dtype)

    def total(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x, implementation="cudnn").sum(dtype=jnp.float32)

    try:
        jax.jit(jax.grad(total)).lower(x).compile()
    except Exception:  # noqa: BLE001, because each reason for a "no" raises another type
        return False
    return True


def unchanged(x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Hashable, as a static part of a module must be. The defaults suit every platform."""

    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = xla_attention
    keep: Callable[[jax.Array], jax.Array] = unchanged  # applied to the residual stream after each branch
    compiler_options: tuple[tuple[str, str], ...] = ()  # for jax.jit


PORTABLE = Kernels()


def kernels_for(platform: str) -> Kernels:
    """The fastest kernels for a platform as JAX names it: 'cpu', 'gpu' ('cuda', 'rocm'), 'tpu', …"""
    if platform == "cpu":
        return Kernels(cpu.attention, cpu.materialised, cpu.COMPILER_OPTIONS)
    return Kernels(gpu_attention) if platform in ("gpu", "cuda", "rocm") else PORTABLE
