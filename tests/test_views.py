"""Views of a photograph that is evaluated."""

import numpy as np
import pytest
from PIL import Image

from vit_nabirds.evaluation.views import COUNTS, views

IMAGES = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", COUNTS)
def test_the_first_view_is_the_image_and_the_second_half_are_mirror_images(kind):
    seen = np.asarray(views(IMAGES, kind))
    assert seen.shape == (COUNTS[kind], 2, 32, 32, 3) and seen.dtype == np.float32
    assert np.array_equal(seen[0], IMAGES)
    if kind != "one":
        half = COUNTS[kind] // 2
        assert np.array_equal(seen[half:], seen[:half, :, :, ::-1])
    assert seen.min() >= 0 and seen.max() <= 1


def test_closer_crops_are_the_four_corners_as_pillow_enlarges_them():
    seen = np.asarray(views(IMAGES, "ten"))
    for number, (left, top) in enumerate([(0, 0), (4, 0), (0, 4), (4, 4)], 1):
        for channel in range(3):
            corner = Image.fromarray(IMAGES[1, top : top + 28, left : left + 28, channel])
            expected = np.asarray(corner.resize((32, 32), Image.BILINEAR))
            np.testing.assert_allclose(seen[number, 1, ..., channel], expected, atol=1e-4)
