"""Cuts a bird out of its photograph and fits it into a square, for training and prediction alike."""

from typing import NamedTuple

import cv2
import numpy as np

from vit_nabirds.data.pictures import Picture

Box = tuple[float, float, float, float]  # left, top, width, height in pixels of the upright picture
Edges = tuple[int, int, int, int]  # left, top, right, bottom


class Crop(NamedTuple):
    """Which part of a picture goes where on a black square."""

    size: int  # of the square
    region: Edges  # of the picture
    canvas: Edges  # where the region lies on the square
    bird: Edges  # where the box lies on the square

    @property
    def scale(self) -> float:
        return self.size / max(self.region[2] - self.region[0], self.region[3] - self.region[1])


def place(picture_size: tuple[int, int], box: Box | None, size: int, margin: float = 0.0) -> Crop:
    """The box (None: the whole picture) with `margin` of its width and height on each side where the picture has it,
    in the centre of the square. ValueError if the box lies outside the picture of (width, height)."""
    width, height = picture_size
    left, top, right, bottom = bird = _inside(box, width, height)
    across, down = margin * (right - left), margin * (bottom - top)
    region = (
        max(round(left - across), 0), max(round(top - down), 0),
        min(round(right + across), width), min(round(bottom + down), height),
    )  # fmt: skip
    sides = region[2] - region[0], region[3] - region[1]
    scale = size / max(sides)
    fitted = [max(round(side * scale), 1) for side in sides]
    x, y = ((size - side) // 2 for side in fitted)
    first = [round(corner + (bird[i] - region[i]) * scale) for i, corner in enumerate((x, y))]
    last = [round(corner + (bird[i + 2] - region[i]) * scale) for i, corner in enumerate((x, y))]
    last = [min(max(end, start + 1), size) for start, end in zip(first, last, strict=True)]
    return Crop(size, region, (x, y, x + fitted[0], y + fitted[1]), (*first, *last))


def cut(picture: Picture, crop: Crop) -> np.ndarray:
    """uint8 (size, size, 3). A large JPEG is decoded at a reduced scale: pixels enough for an average remain."""
    pixels = picture.read(min(2 * crop.scale, 1.0))
    by = pixels.shape[1] / picture.size[0], pixels.shape[0] / picture.size[1]
    left, top, right, bottom = (round(edge * by[i % 2]) for i, edge in enumerate(crop.region))
    return _paste(pixels[top : max(bottom, top + 1), left : max(right, left + 1)], crop)


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 3) as a whole in the centre of a black square (size, size, 3)."""
    return _paste(pixels, place(pixels.shape[1::-1], None, size))


def _paste(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    canvas = np.zeros((crop.size, crop.size, 3), np.uint8)
    x, y, x_end, y_end = crop.canvas
    # Area averages all source pixels, where bicubic skips some and aliases; but it enlarges in blocks.
    method = cv2.INTER_AREA if crop.scale < 1 else cv2.INTER_CUBIC
    canvas[y:y_end, x:x_end] = cv2.resize(pixels, (x_end - x, y_end - y), interpolation=method)
    return canvas


def _inside(box: Box | None, width: int, height: int) -> Edges:
    """The part of a box that lies in the picture, in whole pixels."""
    if box is None:
        return 0, 0, width, height
    left, top = max(round(box[0]), 0), max(round(box[1]), 0)
    right, bottom = min(round(box[0] + box[2]), width), min(round(box[1] + box[3]), height)
    if right <= left or bottom <= top:
        raise ValueError(f"its bounding box lies outside its real {width}x{height} pixels")
    return left, top, right, bottom
