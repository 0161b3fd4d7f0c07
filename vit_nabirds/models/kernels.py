"""What each platform computes in its own way, as one value that the transformer takes."""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_nabirds.models import cpu

log = logging.getLogger("vit_nabirds")


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, num_tokens: int) -> jax.Array:
    """softmax(query keyᵀ / √width) value of the first `num_tokens` keys; all (batch, tokens, heads, width)."""
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=_lengths(key, num_tokens), implementation="xla"
    )


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, num_tokens: int) -> jax.Array:
    """The same by cuDNN, for an even number of tokens; by XLA in the last block, which has one query."""
    if query.shape[1] == 1:
        return xla_attention(query, key, value, num_tokens)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=_lengths(key, num_tokens), implementation="cudnn"
    )


def _lengths(key: jax.Array, num_tokens: int) -> jax.Array | None:
    return None if num_tokens == key.shape[1] else jnp.full(len(key), num_tokens, jnp.int32)


@functools.cache
def why_not_cudnn(device: jax.Device, dtype: str, width: int) -> str | None:
    """None where cuDNN's attention and its gradient compile for this device, else why they do not."""
    x = jax.ShapeDtypeStruct((1, 4, 1, width), dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(jax.grad(lambda x: cudnn_attention(x, x, x, 3).sum(dtype=jnp.float32))).trace(x).lower().compile()
    except Exception as error:  # noqa: BLE001, because each reason raises another type
        return str(error).splitlines()[0]
    return None


def unchanged(x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Hashable, as a static part of a module must be. The defaults suit every platform."""

    attention: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array] = xla_attention
    token_multiple: int = 1  # tokens are padded to a multiple of it
    keep: Callable[[jax.Array], jax.Array] = unchanged  # applied to the residual stream after each branch
    compiler_options: tuple[tuple[str, str], ...] = ()  # for jax.jit


PORTABLE = Kernels()


# Without the first, XLA computes nothing while gradients are added up on GPUs older than Hopper. With the second, those
# of a stage are sent as one piece, however large they are. docs/gpu.md has the effect of each.
GPU_OPTIONS = (
    ("xla_gpu_enable_latency_hiding_scheduler", "True"),
    ("xla_gpu_all_reduce_combine_threshold_bytes", str(2**28)),
)


def kernels_for(device: jax.Device, dtype: str, width: int, drops: bool) -> Kernels:
    """The fastest kernels for a device, given the activations' dtype, a head's width, and whether there is dropout."""
    if device.platform == "cpu":
        return Kernels(cpu.attention, keep=cpu.materialised, compiler_options=cpu.COMPILER_OPTIONS)
    if device.platform not in ("gpu", "cuda", "rocm"):
        return PORTABLE
    # cuDNN would drop other attention weights on another number of devices.
    if reason := "model.dropout_rate is not 0" if drops else why_not_cudnn(device, dtype, width):
        log.info("attention is computed by XLA, not by cuDNN: %s", reason)
        return Kernels(compiler_options=GPU_OPTIONS)
    return Kernels(cudnn_attention, token_multiple=2, compiler_options=GPU_OPTIONS)
