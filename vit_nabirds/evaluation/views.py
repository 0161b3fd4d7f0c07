"""Views of an image, whose logits an evaluation averages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

COUNTS = {"one": 1, "flip": 2, "ten": 10}  # values of config.evaluate.views, and how many views each has
CLOSER = 7 / 8  # side of a closer crop


def views(images: jax.Array, kind: str) -> jax.Array:
    """float32 (n, side, side, 3) -> (COUNTS[kind], n, side, side, 3).

    'one': the image; 'flip': and its mirror image; 'ten': and a crop at each corner, enlarged, with theirs
    (after Krizhevsky et al., 2012).
    """
    if kind == "one":
        return images[None]
    seen = [images, *corners(images)] if kind == "ten" else [images]
    return jnp.stack([*seen, *(image[:, :, ::-1] for image in seen)])


def mean_logits(logits_of: Callable[[jax.Array], jax.Array], seen: jax.Array) -> jax.Array:
    """Of normalised views, (views, n, side, side, 3), one view after another: float32 (n, classes)."""
    return jax.lax.map(logits_of, seen).mean(0) if len(seen) > 1 else logits_of(seen[0])


def corners(images: jax.Array) -> list[jax.Array]:
    """The four corners of the images, each enlarged to their size."""
    side = images.shape[1]
    length = round(CLOSER * side)
    ends = (slice(None, length), slice(side - length, None))
    return [jax.image.resize(images[:, rows, columns], images.shape, "linear") for rows in ends for columns in ends]
