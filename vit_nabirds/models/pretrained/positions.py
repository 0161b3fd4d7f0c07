"""Position embeddings for another number of patches."""

import numpy as np


def resize_positions(positions: np.ndarray, new: int, antialias: bool) -> np.ndarray:
    """(1, 1 + n², d) -> float32 (1, 1 + new², d), bicubic as in torch's `interpolate`, which Hugging Face uses.

    DINOv2 with registers antialiases; torch then uses another cubic and wider windows.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    a, stretch = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs(taps - centers[:, None]) / stretch
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:  # torch cuts the window at the border; without antialiasing it repeats the border
        weight = np.where((taps >= 0) & (taps < old), weight, 0.0)
    weight /= weight.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weight)
    grid = positions[0, 1:].reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("yi,ijd,xj->yxd", matrix, grid, matrix, optimize=True).reshape(1, new * new, -1)
    return np.concatenate([positions[:, :1], grid], axis=1).astype(np.float32)
