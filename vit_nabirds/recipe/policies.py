"""RandAugment (Cubuk et al., 2020) and TrivialAugment (Mueller & Hutter, 2021): random operations on each image.

Under `vmap` each image chooses among the results of all operations, because a switch would compute all of them too. So
those that move pixels share one transform, and those that blend share what they can. Images are float32 (side, side, 3)
in [0, 1]; the operations are those of Pillow, which the papers used.
"""

from typing import NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp

from vit_nabirds.config.fields import Augment
from vit_nabirds.models.normalization import to_float


class Strength(NamedTuple):
    """What the operations do at the largest magnitude."""

    tilt: float  # of 'shear': pixels along one axis for each pixel along the other
    shift: float  # of 'translate': share of the side
    angle: float  # of 'rotate': degrees
    blend: float  # how far the factor of a blend is from 1
    bits: int  # of 8 that 'posterize' takes away


RANDAUGMENT = Strength(0.3, 150 / 331, 30.0, 0.9, 4)
TRIVIALAUGMENT = Strength(0.99, 32 / 224, 135.0, 0.99, 6)  # its "wide" space
LEVELS = 30
OPERATIONS = (
    *("shear_y", "shear_x", "translate_y", "translate_x", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize", "identity"),
)
GREY = 0.5  # where an image was moved away


def random_operations(key: jax.Array, image: jax.Array, settings: Augment) -> jax.Array:
    """As many as the policy says, one after another, each chosen among all with equal chances."""
    if settings.policy == "trivialaugment":
        keys = jax.random.split(key)
        level = jax.random.randint(keys[0], (), 0, LEVELS + 1) / LEVELS
        # XLA would compute the crop in every operation, and all operations again for the mean that contrast needs.
        image = random_operation(keys[1], jax.lax.optimization_barrier(image), level, TRIVIALAUGMENT)
        return jax.lax.optimization_barrier(image)

    def one_more(image: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return random_operation(key, image, settings.magnitude / LEVELS, RANDAUGMENT), None

    return jax.lax.scan(one_more, image, jax.random.split(key, settings.operations))[0]


def random_operation(key: jax.Array, image: jax.Array, level: jax.Array | float, strength: Strength) -> jax.Array:
    """One operation at a level in [0, 1]; those with a direction go either way."""
    keys = jax.random.split(key)
    number = jax.random.randint(keys[0], (), 0, len(OPERATIONS))
    return operate(image, number, level, jax.random.rademacher(keys[1], (), jnp.float32), strength)


def operate(
    image: jax.Array, number: jax.Array | int, level: jax.Array | float, sign: jax.Array | float, strength: Strength
) -> jax.Array:
    """The operation OPERATIONS[number] at a level in [0, 1], `sign` 1 or -1 being its direction where it has one."""

    def share(*names: str) -> jax.Array:
        chosen = jnp.array([OPERATIONS.index(name) for name in names]) == number
        return jnp.where(chosen, sign * level, 0.0)

    moved = warp(
        image, jnp.deg2rad(strength.angle * share("rotate")[0]), strength.tilt * share("shear_y", "shear_x"),
        strength.shift * len(image) * share("translate_y", "translate_x"),
    )  # fmt: skip
    grey, factor = pix.rgb_to_grayscale(image, keep_dims=True), 1 + sign * level * strength.blend
    results = {
        **dict.fromkeys(OPERATIONS[:5], moved),
        "brightness": blend(jnp.zeros(()), image, factor),
        "color": blend(grey, image, factor),
        "contrast": blend(grey.mean(), image, factor),
        "sharpness": blend(smooth(image), image, factor),
        "posterize": posterize(image, jnp.round(level * strength.bits).astype(jnp.int32)),
        "solarize": pix.solarize(image, (1 - level) * 256 / 255),
        "autocontrast": autocontrast(image),
        "equalize": equalize(image),
        "identity": image,
    }
    return jax.lax.select_n(jnp.asarray(number, jnp.int32), *(results[name] for name in OPERATIONS))


def warp(image: jax.Array, angle: jax.Array, tilt: jax.Array, shift: jax.Array) -> jax.Array:
    """The image turned counter-clockwise by `angle` radians about its centre, and tilted and moved by (y, x) to the
    upper left, tilts from its upper left corner; bilinear.

    `pix.affine_transform` takes 200 times as long, because it interpolates between channels too.
    """
    side = len(image)
    y, x = jnp.meshgrid(*[jnp.arange(side) + 0.5] * 2, indexing="ij", sparse=True)
    cos, sin, middle = jnp.cos(angle), jnp.sin(angle), side / 2
    from_y = cos * (y - middle) + sin * (x - middle) + middle + tilt[0] * x + shift[0]
    from_x = cos * (x - middle) - sin * (y - middle) + middle + tilt[1] * y + shift[1]
    inside = (from_y >= 0) & (from_y < side) & (from_x >= 0) & (from_x < side)
    top, left = jnp.floor(from_y - 0.5), jnp.floor(from_x - 0.5)
    below, right = (from_y - 0.5 - top)[..., None], (from_x - 0.5 - left)[..., None]

    def pixels(row: jax.Array, column: jax.Array) -> jax.Array:
        return image[jnp.clip(row, 0, side - 1).astype(jnp.int32), jnp.clip(column, 0, side - 1).astype(jnp.int32)]

    upper = (1 - right) * pixels(top, left) + right * pixels(top, left + 1)
    lower = (1 - right) * pixels(top + 1, left) + right * pixels(top + 1, left + 1)
    return jnp.where(inside[..., None], (1 - below) * upper + below * lower, GREY)


def blend(other: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """From `other` at 0 over the image at 1 to what lies beyond it."""
    return jnp.clip(other + factor * (image - other), 0, 1)


def smooth(image: jax.Array) -> jax.Array:
    """Each pixel with weight 5, its eight neighbours with weight 1."""
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image) / 13


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Without the last `bits` of 8."""
    return to_float((to_bytes(image) >> bits) << bits)


def autocontrast(image: jax.Array) -> jax.Array:
    """Each channel stretched to all of [0, 1]."""
    low, high = image.min((0, 1)), image.max((0, 1))
    return jnp.where(high > low, (image - low) / jnp.maximum(high - low, 1e-6), image)


def equalize(image: jax.Array) -> jax.Array:
    """Each channel with about as many pixels of each value."""
    channels = jnp.arange(3)
    bins = 3 * to_bytes(image) + channels
    counts = jnp.zeros(256 * 3, jnp.int32).at[bins].add(1).reshape(256, 3)
    brightest = 255 - jnp.argmax(counts[::-1] > 0, 0)
    step = (len(image) ** 2 - counts[brightest, channels]) // 255
    darker = jnp.cumsum(counts, 0) - counts
    curve = jnp.minimum((darker + step // 2) // jnp.maximum(step, 1), 255)
    return to_float(jnp.where(step > 0, curve, jnp.arange(256)[:, None]).ravel())[bins]


def to_bytes(image: jax.Array) -> jax.Array:
    """int32 in [0, 255]."""
    return jnp.round(image * 255).astype(jnp.int32)
