"""Augmentation: the course's operations, another draw for each record and step, the same on any layout."""

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np

from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.parallel import devices
from vit_nabirds.recipe.augmentation import augment, random_gamma
from vit_nabirds.training.step import step_keys

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)


def test_each_record_and_step_has_its_own_draw():
    batch = jnp.asarray(np.stack([IMAGE] * 8))
    outputs = [np.asarray(augment(batch, step_keys(0, step)[0], 8)) for step in (0, 0, 1)]
    assert outputs[0].shape == (8, 8, 8, 3) and outputs[0].dtype == np.float32
    assert np.array_equal(outputs[0], outputs[1])
    everything = np.concatenate([outputs[0], outputs[2]]).reshape(16, -1)
    assert len(np.unique(everything, axis=0)) == 16


def test_draws_are_the_same_on_any_number_of_devices():
    images = np.random.default_rng(1).integers(0, 256, (8, 12, 12, 3), np.uint8)
    key = step_keys(3, 5)[0]
    mesh = devices.make_mesh()
    assert mesh.size == 2
    split = devices.to_devices({"image": images}, mesh)["image"]
    compiled = jax.jit(augment, static_argnums=2)
    np.testing.assert_allclose(compiled(split, key, 8), compiled(jnp.asarray(images), key, 8), atol=1e-6)


def test_ranges_of_the_draws():
    """A grey gradient tells what was done to it: which crop, flipped or not, and how its tones were changed."""
    ramp = np.broadcast_to(np.arange(40, 80, dtype=np.uint8)[None, :, None] * 2, (40, 40, 3))
    out = np.asarray(augment(jnp.asarray(np.stack([ramp] * 200)), jax.random.key(0), 24))
    rows = out[:, 0, :, 0]
    flipped = rows[:, 0] > rows[:, -1]
    assert 60 < flipped.sum() < 140
    spread = np.ptp(rows, axis=1) / (2 * 23 / 255)  # contrast x the slope of gamma
    assert 0.5 < spread.min() < 0.8 and 1.1 < spread.max() < 1.6
    assert out.min() >= 0 and out.max() <= 1 and np.isfinite(out).all()


def test_black_and_white_stay_finite():
    extremes = np.zeros((4, 10, 10, 3), np.uint8)
    extremes[:, :5] = 255
    assert np.isfinite(augment(jnp.asarray(extremes), jax.random.key(0), 8)).all()


def test_normalisation():
    normalization = Normalization(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    out = zscore(to_float(jnp.full((1, 2, 2, 3), 255, jnp.uint8)), normalization)
    np.testing.assert_allclose(out[0, 0, 0], [1, 3, 1], rtol=1e-6)


def test_gamma_is_that_of_dm_pix():
    image, key = jnp.linspace(-0.1, 1.1, 300).reshape(10, 10, 3), jax.random.key(0)
    ours, theirs = random_gamma(key, image, 0.6, 1.2), pix.random_gamma(key, image, 0.6, 1.2)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(ours - image.clip(0, 1)).max() > 0.01
