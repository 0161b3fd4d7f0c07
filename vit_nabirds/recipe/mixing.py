"""Mixing of neighbours in a batch: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019)."""

import functools

import jax
import jax.numpy as jnp

from vit_nabirds.config.fields import Augment
from vit_nabirds.recipe.augmentation import MIXING


def mix(
    images: jax.Array, targets: jax.Array, keys: jax.Array, settings: Augment
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Images 2j and 2j + 1 of float32 (n, side, side, 3), n even, and their targets float32 (n, classes), mixed.

    Both keep the same share of themselves and of their target; it depends on keys[2j] alone.
    """
    pairs = [x.reshape(-1, 2, *x.shape[1:]) for x in (images, targets, keys)]
    mixed = jax.vmap(functools.partial(mix_pair, settings=settings))(pairs[0], pairs[1], pairs[2][:, 0])
    return mixed[0].reshape(images.shape), mixed[1].reshape(targets.shape)


def mix_pair(
    images: jax.Array, targets: jax.Array, key: jax.Array, settings: Augment
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(2, side, side, 3) and (2, classes): what an image gives away, the other one gets."""
    which, how, mixup_key, *cutmix_keys = jax.random.split(jax.random.fold_in(key, MIXING), 5)
    share, kept = 1.0, jnp.ones((1, 1))  # of each target, and of each pixel
    if settings.mixup:
        share = jax.random.beta(mixup_key, settings.mixup, settings.mixup)
        kept = kept * share
    if settings.cutmix:
        outside = outside_box(*cutmix_keys, settings.cutmix, images.shape[1])
        cut = True if not settings.mixup else jax.random.bernoulli(how)
        share, kept = jnp.where(cut, outside.mean(), share), jnp.where(cut, outside, kept)
    is_mixed = jax.random.uniform(which) < settings.mixed
    share, kept = jnp.where(is_mixed, share, 1.0), jnp.where(is_mixed, kept, 1.0)[..., None]
    return kept * images + (1 - kept) * images[::-1], share * targets + (1 - share) * targets[::-1]


def outside_box(area_key: jax.Array, place_key: jax.Array, alpha: float, side: int) -> jax.Array:
    """float32 (side, side): 0 in a random square, of which only what lies in the image counts, and 1 around it."""
    length = jnp.sqrt(1 - jax.random.beta(area_key, alpha, alpha)) * side
    middle = jax.random.randint(place_key, (2, 1), 0, side)
    places = jnp.arange(side)
    half = length.astype(jnp.int32) // 2
    rows, columns = (places >= middle - half) & (places < middle + half)
    return 1.0 - (rows[:, None] & columns)
