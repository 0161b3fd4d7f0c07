"""From uint8 pixels to what the model expects."""

import dataclasses

import jax
import jax.numpy as jnp

RANGES = {"mean": (-255, 255), "std": (0.001, 255)}  # of what may be meant: anything else makes pixels meaningless


def are_valid(name: str, values: object) -> bool:
    """Whether these are the values of three channels, for "mean" or "std"."""
    least, most = RANGES[name]
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(type(x) in (int, float) and least <= x <= most for x in values)
    )


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel of pixels in [0, 1], from the training of the checkpoint."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def zscore(images: jax.Array, normalization: Normalization) -> jax.Array:
    """Pixels in [0, 1] -> zero mean and unit variance in each channel."""
    return (images - jnp.array(normalization.mean)) / jnp.array(normalization.std)
