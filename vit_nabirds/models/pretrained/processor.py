"""A preprocessor_config.json: how a checkpoint wants its images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_nabirds.data.crops import fit
from vit_nabirds.errors import UserError
from vit_nabirds.models.normalization import Normalization

# Fields of ours.
PAD_TO_SQUARE = "vit_nabirds_pad_to_square"  # whether to fit the image into a black square first
CROP = "vit_nabirds_crop"  # what of its photographs the model was trained on: "box" (of the bird) or "none" (all)


def read_processor(processor: dict, hf: dict, file: Path) -> tuple[int, Normalization]:
    """Side of the images in pixels and their normalisation; UserError for what our loader does not do."""

    def require(field: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"{file}: {field} is {processor.get(field)!r}; {expected}.")

    for field in ("do_resize", "do_rescale"):
        require(field, processor.get(field, True) is True, "only true is supported")
    factor = processor.get("rescale_factor", 1 / 255)
    require("rescale_factor", isinstance(factor, float) and abs(255 * factor - 1) < 1e-6, "only 1/255 is supported")
    field = "crop_size" if processor.get("do_center_crop") else "size"
    size = _square_side(processor.get(field, hf["image_size"]))
    require(field, size is not None, "expected a square")
    require(field, size % hf["patch_size"] == 0, f"expected a multiple of the patch_size {hf['patch_size']}")
    if not processor.get("do_normalize", True):
        return size, Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    values = []
    for field in ("image_mean", "image_std"):
        value = processor.get(field, [0.5, 0.5, 0.5])
        numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        require(field, numbers and (field == "image_mean" or min(value) > 0), "expected three numbers")
        values.append(tuple(value))
    return size, Normalization(*values)


def crop_of(processor: dict) -> str | None:
    """What a model was trained on, as `CROP`; None if preprocessor_config.json leaves it open."""
    return processor.get(CROP, "box" if processor.get(PAD_TO_SQUARE) else None)


def _square_side(size) -> int | None:
    """Pixels, from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}; None if it is not a square."""
    if isinstance(size, dict):
        height, width = (size.get("shortest_edge", size.get(side)) for side in ("height", "width"))
        size = height if height == width else None
    return size if isinstance(size, int) and size > 0 else None


def preprocessing(folder: Path, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (height, width, 3) -> float32 (size, size, 3), as preprocessor_config.json says, but for the size."""
    from transformers import AutoImageProcessor  # takes a second

    try:
        processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    except Exception as error:  # transformers raises many types
        raise UserError(f"{folder}: AutoImageProcessor says: {str(error).splitlines()[0]}") from None
    square = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size} if "shortest_edge" in processor.size else square}
    if crops := getattr(processor, "do_center_crop", False):
        sizes["crop_size"] = square
    own = processor.crop_size if crops else processor.size
    sizes = {} if size in (own.get("height"), own.get("shortest_edge")) else sizes
    options = sizes | {"return_tensors": "np", "input_data_format": "channels_last"}
    return lambda image: processor(images=image, **options)["pixel_values"][0].transpose(1, 2, 0)


def padding_to_square(size: int, normalization: Normalization) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (height, width, 3) -> float32 (size, size, 3), in a black square as `prepare` makes it, and normalised."""
    mean, std = np.array(normalization.mean, np.float32), np.array(normalization.std, np.float32)
    return lambda image: (fit(image, size).astype(np.float32) / 255 - mean) / std
