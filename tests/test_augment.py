"""Augmentation: the course's operations, another draw for each record and step, the same on any layout."""

import functools

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vit_nabirds.config.fields import Augment
from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.parallel import devices
from vit_nabirds.recipe.augmentation import (
    augment,
    color_jitter,
    image_keys,
    random_box,
    random_erasing,
    random_gamma,
    resized_crop,
)
from vit_nabirds.training.step import step_keys

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
NOTHING = {"flip": False, "contrast": (1.0, 1.0), "gamma": (1.0, 1.0)}
ALL = Augment(crop="resized", color_jitter=0.4, policy="randaugment", erasing=0.5)


def keys_of(seed: int, count: int) -> jax.Array:
    return image_keys(jax.random.key(seed), jnp.arange(count))


@pytest.mark.parametrize("settings", [Augment(), ALL, Augment(policy="trivialaugment")])
def test_each_record_and_step_has_its_own_draw(settings):
    batch = np.stack([IMAGE] * 8)
    keys = [image_keys(step_keys(0, step)[0], jnp.arange(8)) for step in (0, 0, 1)]
    outputs = [np.asarray(jax.jit(augment, static_argnums=(2, 3))(batch, key, 8, settings)) for key in keys]
    assert outputs[0].shape == (8, 8, 8, 3) and outputs[0].dtype == np.float32
    assert np.array_equal(outputs[0], outputs[1])
    assert all(0 <= out.min() and out.max() <= 1 for out in outputs)
    everything = np.concatenate([outputs[0], outputs[2]]).reshape(16, -1)
    assert len(np.unique(everything, axis=0)) == 16


@pytest.mark.parametrize("settings", [Augment(), ALL])
def test_draws_are_the_same_on_any_number_of_devices(settings):
    images = np.random.default_rng(1).integers(0, 256, (8, 12, 12, 3), np.uint8)
    mesh = devices.make_mesh()
    assert mesh.size == 2
    split = devices.to_devices({"image": images}, mesh)["image"]
    compiled = jax.jit(augment, static_argnums=(2, 3))
    on_one = compiled(images, keys_of(3, 8), 8, settings)
    np.testing.assert_allclose(compiled(split, keys_of(3, 8), 8, settings), on_one, atol=1e-6)
    alone = augment(images[5:6], image_keys(jax.random.key(3), jnp.array([5])), 8, settings)
    np.testing.assert_allclose(alone[0], on_one[5], atol=1e-6)


def test_by_default_it_draws_what_it_always_drew():
    """Of 2026-09: written out with dm-pix, so that old runs resume with the same images."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        crop, flip, contrast, gamma = jax.random.split(key, 4)
        image = pix.random_crop(crop, image, (8, 8, 3)).astype(jnp.float32) / 255
        image = pix.random_contrast(contrast, pix.random_flip_left_right(flip, image), 0.8, 1.2)
        return pix.random_gamma(gamma, image, 0.6, 1.2)

    expected = [one(jnp.asarray(IMAGE), jax.random.fold_in(jax.random.key(9), position)) for position in range(8)]
    measured = augment(jnp.asarray(np.stack([IMAGE] * 8)), keys_of(9, 8), 8, Augment())
    np.testing.assert_allclose(measured, np.stack(expected), atol=1e-6)


def test_ranges_of_the_draws():
    """A grey gradient tells what was done to it: which crop, flipped or not, and how its tones were changed."""
    ramp = np.broadcast_to(np.arange(40, 80, dtype=np.uint8)[None, :, None] * 2, (40, 40, 3))
    out = np.asarray(augment(jnp.asarray(np.stack([ramp] * 200)), keys_of(0, 200), 24, Augment()))
    rows = out[:, 0, :, 0]
    flipped = rows[:, 0] > rows[:, -1]
    assert 60 < flipped.sum() < 140
    spread = np.ptp(rows, axis=1) / (2 * 23 / 255)  # contrast x the slope of gamma
    assert 0.5 < spread.min() < 0.8 and 1.1 < spread.max() < 1.6
    assert out.min() >= 0 and out.max() <= 1 and np.isfinite(out).all()


@pytest.mark.parametrize("settings", [Augment(), ALL, Augment(policy="trivialaugment"), Augment(gamma=(1.0, 1.0))])
def test_black_and_white_stay_finite_and_in_range(settings):
    extremes = np.zeros((8, 10, 10, 3), np.uint8)
    extremes[:4, :5] = 255
    out = jax.jit(augment, static_argnums=(2, 3))(extremes, keys_of(0, 8), 8, settings)
    assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


def test_what_is_switched_off_neither_changes_nor_draws_anything():
    images = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(augment(images, keys_of(0, 4), 8, Augment(**NOTHING)), images / 255, atol=1e-7)

    def draws(settings: Augment) -> int:
        function = functools.partial(augment, crop=6, settings=settings)
        return str(jax.make_jaxpr(function)(images, keys_of(0, 4))).count("random_bits")

    crop = draws(Augment(**NOTHING))
    one_on = [draws(Augment(**NOTHING | {name: getattr(Augment(), name)})) for name in NOTHING]
    assert one_on == [crop + 1] * 3


def test_a_resized_crop_is_that_of_pillow():
    """Which filters as it shrinks: a pattern of single pixels becomes grey, not another pattern."""
    image = np.random.default_rng(3).integers(0, 256, (90, 90, 3), np.uint8)
    image[:, ::2] //= 4
    for seed in range(6):
        corner, size = random_box(key := jax.random.key(seed), (0.3, 1.0), (0.75, 4 / 3))
        (top, left), (height, width) = 90 * np.asarray(corner), 90 * np.asarray(size)
        pillow = Image.fromarray(image).resize((24, 24), Image.BILINEAR, box=(left, top, left + width, top + height))
        ours = 255 * resized_crop(key, jnp.asarray(image / np.float32(255)), 24, (0.3, 1.0), (0.75, 4 / 3))
        np.testing.assert_allclose(ours, np.asarray(pillow, np.float32), atol=1.5)


def test_random_boxes_have_the_areas_and_aspects_that_were_asked_for():
    keys = jax.random.split(jax.random.key(0), 2000)
    corners, sizes = jax.vmap(lambda key: random_box(key, (0.08, 0.5), (0.5, 2.0)))(keys)
    areas, aspects = sizes.prod(-1), sizes[:, 1] / sizes[:, 0]
    assert 0.08 <= areas.min() < 0.085 and 0.49 < areas.max() < 0.501
    assert np.mean(areas) == pytest.approx(0.29, abs=0.01)
    assert 0.499 < aspects.min() < 0.51 and 1.96 < aspects.max() < 2.001
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.03)
    assert corners.min() >= 0 and (corners + sizes).max() <= 1 + 1e-6
    free = corners / (1 - sizes)
    assert np.mean(free, 0) == pytest.approx([0.5, 0.5], abs=0.03) and np.ptp(free, 0).min() > 0.98


def test_a_box_that_never_fits_is_the_middle_of_the_image():
    corner, size = random_box(jax.random.key(0), (1.0, 1.0), (2.0, 4.0))
    np.testing.assert_allclose([corner, size], [[0.25, 0], [0.5, 1]], atol=1e-6)
    corner, size = random_box(jax.random.key(0), (1.0, 1.0), (0.75, 4 / 3))
    np.testing.assert_allclose([corner, size], [[0, 0], [1, 1]], atol=1e-6)


def test_erasing_puts_noise_in_place_of_one_rectangle():
    image, keys = jnp.full((40, 40, 3), 2.0), jax.random.split(jax.random.key(0), 400)
    out = np.asarray(jax.vmap(lambda key: random_erasing(key, image, 0.25))(keys))
    erased = (out != 2).any(-1)
    touched = erased.any((1, 2))
    assert 70 < touched.sum() < 130
    boxes = erased.any(1).sum(1) * erased.any(2).sum(1)
    assert np.array_equal(boxes, erased.sum((1, 2)))  # the pixels of a rectangle, all of them
    assert 0.015 < boxes[touched].min() / 1600 < 0.06 and 0.3 < boxes[touched].max() / 1600 < 0.42
    noise = out[erased]
    assert noise.min() == 0 and noise.max() == 1 and noise.mean(0) == pytest.approx([0.5] * 3, abs=0.01)
    assert abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.02


def test_jitter_changes_brightness_contrast_and_saturation_as_far_as_it_says():
    image = np.random.default_rng(4).uniform(0.4, 0.5, (6, 6, 3)).astype(np.float32)  # nothing is clipped
    keys = jax.random.split(jax.random.key(1), 1000)
    out = np.asarray(jax.vmap(lambda key: color_jitter(key, image, 0.3))(keys))
    luma = np.array([0.2989, 0.5870, 0.1140])
    grey = out @ luma
    brightness = grey.mean((1, 2)) / (image @ luma).mean()
    contrast = grey.std((1, 2)) / (image @ luma).std() / brightness
    chroma = (out - grey[..., None]).std((1, 2, 3)) / (image - (image @ luma)[..., None]).std()
    for factor in (brightness, contrast, chroma / brightness / contrast):
        assert 0.7 - 0.01 < factor.min() < 0.72 and 1.28 < factor.max() < 1.3 + 0.01
        assert factor.mean() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef([brightness, contrast, chroma / brightness / contrast]) - np.eye(3)).max() < 0.1


def test_normalisation():
    normalization = Normalization(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    out = zscore(to_float(jnp.full((1, 2, 2, 3), 255, jnp.uint8)), normalization)
    np.testing.assert_allclose(out[0, 0, 0], [1, 3, 1], rtol=1e-6)


def test_gamma_is_that_of_dm_pix():
    image, key = jnp.linspace(-0.1, 1.1, 300).reshape(10, 10, 3), jax.random.key(0)
    ours, theirs = random_gamma(key, image, 0.6, 1.2), pix.random_gamma(key, image, 0.6, 1.2)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(ours - image.clip(0, 1)).max() > 0.01
