"""Mixup and CutMix: what an image gets of its neighbour, its target gets too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_nabirds.config.fields import Augment
from vit_nabirds.recipe.augmentation import image_keys
from vit_nabirds.recipe.mixing import mix

SIDE = 16
N = 400


def mixed(settings: Augment, keys=None, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Image i has the value i everywhere, and class i: what was mixed can be read from each pixel."""
    images = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, SIDE, SIDE, 3))
    keys = image_keys(jax.random.key(0), jnp.arange(n)) if keys is None else keys
    images, targets = jax.jit(mix, static_argnums=3)(images, jnp.eye(n), keys, settings)
    assert images.shape == (n, SIDE, SIDE, 3) and targets.shape == (n, n) and images.dtype == targets.dtype == "float32"
    return np.asarray(images), np.asarray(targets)


def shares(images: np.ndarray) -> np.ndarray:
    """Of the neighbour in each pixel of each image, (n, SIDE, SIDE)."""
    own = np.arange(len(images))[:, None, None]
    partner = np.where(own % 2, own - 1, own + 1)
    return (images[..., 0] - own) / (partner - own)


@pytest.mark.parametrize(
    "settings",
    [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.8, cutmix=1.0), Augment(cutmix=1.0, mixed=0.5)],
)
def test_targets_have_the_shares_of_the_pixels(settings):
    images, targets = mixed(settings)
    given = shares(images).mean((1, 2))
    own = np.arange(N)
    np.testing.assert_allclose(targets[own, own], 1 - given, atol=1e-4)
    np.testing.assert_allclose(targets[own, own ^ 1], given, atol=1e-4)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(given[::2], given[1::2], atol=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 4.0])
def test_mixup_draws_from_the_beta_distribution(alpha):
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1))."""
    images, _ = mixed(Augment(mixup=alpha))
    given = shares(images)
    assert np.ptp(given, axis=(1, 2)).max() == 0
    drawn = given[::2, 0, 0]
    assert drawn.mean() == pytest.approx(0.5, abs=0.1)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.3)


def test_cutmix_pastes_a_rectangle_that_may_be_cut_by_the_edge():
    images, _ = mixed(Augment(cutmix=1.0))
    pasted = shares(images)
    assert set(np.unique(pasted)) == {0, 1}
    heights, widths = pasted.any(2).sum(1), pasted.any(1).sum(1)
    assert np.array_equal(heights * widths, pasted.sum((1, 2)))
    assert np.array_equal(pasted[::2], pasted[1::2])
    assert np.mean(heights != widths) > 0.3  # squares, but for those at the edge
    assert (pasted.mean(0) > 0.02).all()  # anywhere
    assert pasted.mean() == pytest.approx(0.25, abs=0.06)  # half of the area, on average, and half of that outside
    inside = (heights == widths) & ~pasted[:, [0, -1]].any((1, 2)) & ~pasted[:, :, [0, -1]].any((1, 2)) & (heights > 0)
    assert inside.any() and (heights[inside] % 2 == 0).all()


def test_one_of_the_two_by_a_fair_coin_and_only_a_share_of_the_pairs():
    images, targets = mixed(Augment(mixup=1.0, cutmix=1.0, mixed=0.5))
    given = shares(images)[::2]
    blended = ((given > 0) & (given < 1)).any((1, 2))
    pasted = ~blended & given.any((1, 2))
    assert 30 < blended.sum() < 70 and 25 < pasted.sum() < 70
    untouched = np.repeat(~blended & ~pasted, 2)
    assert 75 < untouched.sum() / 2 < 130
    assert np.array_equal(targets[untouched], np.eye(N, dtype=np.float32)[untouched])
    assert np.array_equal(images[untouched, 0, 0, 0], np.arange(N)[untouched])


def test_a_pair_depends_on_the_key_of_its_first_image_alone():
    settings, keys = Augment(mixup=1.0, cutmix=1.0), image_keys(jax.random.key(1), jnp.arange(8))
    images, targets = mixed(settings, keys, 8)
    others = image_keys(jax.random.key(2), jnp.arange(8))
    again = mixed(settings, jnp.where(jnp.arange(8) % 2 == 1, others, keys), 8)
    assert np.array_equal(images, again[0]) and np.array_equal(targets, again[1])
    whole = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None, None], (8, SIDE, SIDE, 3))
    part, _ = mix(whole[4:6], jnp.eye(8)[4:6], keys[4:6], settings)
    np.testing.assert_allclose(part, images[4:6], atol=1e-6)
    assert not np.array_equal(images, mixed(settings, others, 8)[0])
