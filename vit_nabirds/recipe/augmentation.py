"""Augmentation of uint8 batches, on the device, inside the jitted step."""

import dm_pix as pix
import jax
import jax.numpy as jnp

from vit_nabirds.config.fields import Augment
from vit_nabirds.models.normalization import to_float
from vit_nabirds.recipe.policies import blend, random_operations

# Folded into an image's key, for draws of their own: 0 to 3 are the keys of crop, flip, contrast and gamma.
POLICY, JITTER, ERASING, MIXING = range(4, 8)


def image_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """A key for each image, from the key of a step and the images' places in the global batch, int32 (n,)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def augment(images: jax.Array, keys: jax.Array, crop: int, settings: Augment) -> jax.Array:
    """uint8 (batch, size, size, 3) -> float32 (batch, crop, crop, 3) in [0, 1], at random.

    An image's draw depends on its key alone (`image_keys`), so that it is the same on any number of devices and hosts.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 4)
        if settings.crop == "resized":
            image = resized_crop(keys[0], to_float(image), crop, settings.area, settings.aspect)
        else:
            image = to_float(pix.random_crop(keys[0], image, (crop, crop, 3)))
        if settings.flip:
            image = pix.random_flip_left_right(keys[1], image)
        if settings.policy != "none":
            image = random_operations(jax.random.fold_in(key, POLICY), image, settings)
        if settings.color_jitter:
            image = color_jitter(jax.random.fold_in(key, JITTER), image, settings.color_jitter)
        if settings.contrast != (1, 1):
            image = pix.random_contrast(keys[2], image, *settings.contrast)
        if settings.gamma != (1, 1):
            image = random_gamma(keys[3], image, *settings.gamma)
        elif settings.contrast != (1, 1):
            image = jnp.clip(image, 0, 1)
        if settings.erasing:
            image = random_erasing(jax.random.fold_in(key, ERASING), image, settings.erasing)
        return image

    return jax.vmap(one)(images, keys)


def random_gamma(key: jax.Array, image: jax.Array, min_gamma: float, max_gamma: float) -> jax.Array:
    """`pix.random_gamma` fifteen times faster: XLA's CPU backend takes powers one number at a time."""
    gamma = jax.random.uniform(key, (), minval=min_gamma, maxval=max_gamma)
    return jnp.exp(gamma * jnp.log(jnp.clip(image, 0, 1)))


def resized_crop(
    key: jax.Array, image: jax.Array, crop: int, area: tuple[float, float], aspect: tuple[float, float]
) -> jax.Array:
    """A random part of float32 (size, size, 3), resized to (crop, crop, 3) without aliasing (Szegedy et al., 2015)."""
    corner, size = random_box(key, area, aspect)
    scale = crop / (size * len(image))
    shape = (crop, crop, 3)
    return jax.image.scale_and_translate(image, shape, (0, 1), scale, -corner * len(image) * scale, "linear").clip(0, 1)


def random_box(
    key: jax.Array, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Upper left corner (y, x) and size (height, width) of a random part of a square image, as shares of its side.

    The first of ten random areas and aspects (width by height) that fits into the image, or else its middle.
    """
    keys = jax.random.split(key, 3)
    areas = jax.random.uniform(keys[0], (10,), minval=area[0], maxval=area[1])
    aspects = jnp.exp(jax.random.uniform(keys[1], (10,), minval=jnp.log(aspect[0]), maxval=jnp.log(aspect[1])))
    sizes = jnp.sqrt(jnp.stack([areas / aspects, areas * aspects]))
    fits = (sizes <= 1).all(0)
    nearest = min(max(1.0, aspect[0]), aspect[1])
    size = jnp.where(fits.any(), sizes[:, jnp.argmax(fits)], jnp.array([min(1, 1 / nearest), min(1, nearest)]))
    return (1 - size) * jnp.where(fits.any(), jax.random.uniform(keys[2], (2,)), 0.5), size


def color_jitter(key: jax.Array, image: jax.Array, most: float) -> jax.Array:
    """Brightness, contrast and saturation, in this order, each times a factor from 1 - most to 1 + most."""
    brightness, contrast, saturation = jax.random.uniform(key, (3,), minval=1 - most, maxval=1 + most)
    image = blend(jnp.zeros(()), image, brightness)
    image = blend(pix.rgb_to_grayscale(image).mean(), image, contrast)
    return blend(pix.rgb_to_grayscale(image, keep_dims=True), image, saturation)


def random_erasing(key: jax.Array, image: jax.Array, rate: float) -> jax.Array:
    """Random pixels in place of a random rectangle, at a rate (Zhong et al., 2020, with their ranges)."""
    keys = jax.random.split(key, 3)
    corner, size = random_box(keys[0], (0.02, 0.4), (0.3, 1 / 0.3))
    places = (jnp.arange(len(image)) + 0.5) / len(image)
    rows, columns = ((places >= start) & (places < start + length) for start, length in zip(corner, size, strict=True))
    erased = rows[:, None] & columns & jax.random.bernoulli(keys[1], rate)
    noise = jax.lax.bitcast_convert_type(jax.random.bits(keys[2], image.shape[:2]), jnp.uint8)[..., :3]
    return jnp.where(erased[..., None], to_float(noise), image)
