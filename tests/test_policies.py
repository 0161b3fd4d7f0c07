"""RandAugment and TrivialAugment: each operation is that of Pillow, chosen and scaled as the papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_nabirds.config.fields import Augment
from vit_nabirds.recipe.policies import OPERATIONS, RANDAUGMENT, TRIVIALAUGMENT, operate, random_operations

SIDE = 40
COMPILED = jax.jit(operate, static_argnums=4)
DRAW = np.random.default_rng(0)
SMOOTH = Image.fromarray(DRAW.integers(30, 200, (5, 5, 3), np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
IMAGE = Image.fromarray((np.asarray(SMOOTH) + DRAW.integers(0, 12, (SIDE, SIDE, 3))).astype(np.uint8))
ROUGH = Image.fromarray(DRAW.integers(20, 230, (SIDE, SIDE, 3), np.uint8))


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=(128,) * 3)


def pillow(name: str, image: Image.Image, level: float, sign: float, ours: str) -> Image.Image:
    """With the ranges of torchvision's RandAugment and of TrivialAugment's wide space."""
    wide = ours == "trivial"
    tilt, blend = sign * level * (0.99 if wide else 0.3), 1 + sign * level * (0.99 if wide else 0.9)
    shift = sign * level * SIDE * (32 / 224 if wide else 150 / 331)
    match name:
        case "shear_x":
            return affine(image, 1, tilt, 0, 0, 1, 0)
        case "shear_y":
            return affine(image, 1, 0, 0, tilt, 1, 0)
        case "translate_x":
            return affine(image, 1, 0, shift, 0, 1, 0)
        case "translate_y":
            return affine(image, 1, 0, 0, 0, 1, shift)
        case "rotate":
            return image.rotate(sign * level * (135 if wide else 30), Image.BILINEAR, fillcolor=(128,) * 3)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(blend)
        case "color":
            return ImageEnhance.Color(image).enhance(blend)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(blend)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(blend)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(level * (6 if wide else 4)))
        case "solarize":
            return ImageOps.solarize(image, 256 * (1 - level))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "identity":
            return image


@pytest.mark.parametrize("policy", ["rand", "trivial"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_pillow(name, policy):
    strength = {"rand": RANDAUGMENT, "trivial": TRIVIALAUGMENT}[policy]
    for level, sign in ((0.0, 1.0), (0.3, 1.0), (0.3, -1.0), (1.0, 1.0), (1.0, -1.0)):
        for image in (IMAGE, ROUGH):
            pixels = np.asarray(image, np.float32) / 255
            measured = 255 * np.asarray(COMPILED(pixels, OPERATIONS.index(name), level, sign, strength))
            difference = np.abs(measured - np.asarray(pillow(name, image, level, sign, policy), np.float32))
            inner = difference[1:-1, 1:-1]  # Pillow does not smooth the outermost pixels, and rounds
            exact = name in ("posterize", "solarize", "equalize", "identity")
            assert np.mean(inner > 2.5) < 0.005 and (inner.max() < 0.01 or not exact), (level, sign)
            assert inner.mean() < 1
        assert level == 0 or name == "identity" or np.abs(measured - 255 * pixels).max() > 0.9


def test_an_image_of_one_value_stays_what_it_is():
    flat = np.full((SIDE, SIDE, 3), [0.2, 0.6, 1.0], np.float32)
    for name in ("autocontrast", "equalize", "sharpness", "identity"):
        np.testing.assert_allclose(COMPILED(flat, OPERATIONS.index(name), 1.0, 1.0, RANDAUGMENT), flat, atol=1e-6)


def outputs(settings: Augment, count: int) -> np.ndarray:
    """float32 (count, SIDE * SIDE * 3) in [0, 255]"""
    keys, image = jax.random.split(jax.random.key(0), count), jnp.asarray(ROUGH, jnp.float32) / 255
    out = jax.jit(jax.vmap(lambda key: random_operations(key, image, settings)))(keys)
    return 255 * np.asarray(out).reshape(count, -1)


def test_randaugment_chooses_among_all_operations_and_both_directions():
    pixels = np.asarray(ROUGH, np.float32) / 255
    kinds = [(name, sign) for name in OPERATIONS for sign in (1.0, -1.0)]
    expected = [COMPILED(pixels, OPERATIONS.index(name), 0.3, sign, RANDAUGMENT) for name, sign in kinds]
    expected = 255 * np.stack(expected).reshape(len(kinds), -1)
    drawn = outputs(Augment(policy="randaugment", operations=1), 700)
    errors = np.stack([np.abs(drawn - one).mean(1) for one in expected], 1)
    assert errors.min(1).max() < 0.1
    drawn = [kinds[number] for number in errors.argmin(1)]
    names = [name for name, _ in drawn]
    assert all(25 < names.count(name) < 80 for name in OPERATIONS)
    assert abs(np.mean([sign for name, sign in drawn if name in OPERATIONS[:9]])) < 0.15


def test_randaugment_does_as_many_operations_as_it_is_told():
    """The share of images that nothing happened to: 1/14 with one operation, 1/14² with two."""
    original = np.asarray(ROUGH).reshape(-1)
    for operations, low, high in ((1, 0.05, 0.1), (2, 0.0, 0.02)):
        settings = Augment(policy="randaugment", operations=operations)
        assert low <= (np.abs(outputs(settings, 800) - original).max(1) < 0.5).mean() <= high
    weak = outputs(Augment(policy="randaugment", magnitude=0.0), 60)
    changed = np.abs(weak - original).max(1) > 0.5
    assert 0.05 < changed.mean() < 0.6  # autocontrast and equalize have no strength


def test_trivialaugment_draws_the_strength_of_each_image():
    """A white line on black: where it went shows how far the image was moved."""
    line = np.zeros((112, 112, 3), np.float32)
    line[:, 56] = 1
    keys = jax.random.split(jax.random.key(1), 800)
    settings = Augment(policy="trivialaugment")
    out = jax.lax.map(lambda key: random_operations(key, jnp.asarray(line), settings), keys)
    rows = np.asarray(out)[:, 30, :, 0]
    moved = (np.asarray(out)[:, ::50, :, 0] == rows[:, None]).all((1, 2)) & ((rows > 0.52).sum(1) == 1)
    places = rows[moved].argmax(1) - 56
    assert places.min() < -12 and places.max() > 12 and abs(places).max() <= 16 and len(set(places)) > 20
