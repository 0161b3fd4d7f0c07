"""A preprocessor_config.json: how a checkpoint wants its images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_nabirds.data.crops import fit
from vit_nabirds.errors import UserError, shown
from vit_nabirds.models.limits import problem_of
from vit_nabirds.models.normalization import RANGES, Normalization, are_valid
from vit_nabirds.models.pretrained.hf_config import architecture_of

# Fields of ours.
PAD_TO_SQUARE = "vit_nabirds_pad_to_square"  # whether to fit the image into a black square first
CROP = "vit_nabirds_crop"  # what of its photographs the model was trained on: "box" (of the bird) or "none" (all)


def read_processor(processor: dict, hf: dict, file: Path) -> tuple[int, Normalization]:
    """Side of the images in pixels and their normalisation; UserError for what our loader does not do."""

    def require(field: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"{file}: {field} is {shown(processor.get(field))}; {expected}.")

    for field in ("do_resize", "do_rescale"):
        require(field, processor.get(field, True) is True, "only true is supported")
    for field in ("do_normalize", "do_center_crop", PAD_TO_SQUARE):
        require(field, processor.get(field) in (None, True, False), "expected true or false")
    factor = processor.get("rescale_factor", 1 / 255)
    require("rescale_factor", isinstance(factor, float) and abs(255 * factor - 1) < 1e-6, "only 1/255 is supported")
    field = "crop_size" if processor.get("do_center_crop") else "size"
    size = _square_side(processor.get(field, hf["image_size"]))
    require(field, size is not None, "expected a square")
    problem = problem_of(architecture_of(hf) | {"image_size": size})
    require(field, problem is None, f"expected {problem and problem[1]}")
    if not processor.get("do_normalize", True):
        return size, Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    values = {}
    for name, (least, most) in RANGES.items():
        values[name] = value = processor.get(f"image_{name}", [0.5, 0.5, 0.5])
        require(f"image_{name}", are_valid(name, value), f"expected three numbers from {least:g} to {most:g}")
    return size, Normalization(**{name: tuple(value) for name, value in values.items()})


def crop_of(processor: dict) -> str | None:
    """What a model was trained on, as `CROP`; None if preprocessor_config.json leaves it open."""
    return processor.get(CROP, "box" if processor.get(PAD_TO_SQUARE) else None)


def _square_side(size) -> int | None:
    """Pixels, from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}; None if it is not a square."""
    if isinstance(size, dict):
        height, width = (size.get("shortest_edge", size.get(side)) for side in ("height", "width"))
        size = height if height == width else None
    return size if type(size) is int and size > 0 else None


def preprocessing(folder: Path, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (height, width, 3) -> float32 (size, size, 3), as preprocessor_config.json says, but for the size."""
    from transformers import AutoImageProcessor  # takes a second

    try:
        # Code in the folder is not run, and nobody is asked whether it may be.
        processor = AutoImageProcessor.from_pretrained(folder, use_fast=False, trust_remote_code=False)
        sizes = _sizes(processor, size)
    except Exception as error:  # transformers raises many types
        raise UserError(f"{folder}: AutoImageProcessor says: {(str(error).splitlines() or [repr(error)])[0]}") from None
    options = sizes | {"return_tensors": "np", "input_data_format": "channels_last"}

    def prepare(image: np.ndarray) -> np.ndarray:
        pixels = processor(images=image, **options)["pixel_values"][0].transpose(1, 2, 0)
        if pixels.shape != (size, size, 3) or not np.isfinite(pixels).all():
            raise UserError(f"{folder}: its image processor makes no picture of {size} x {size} pixels.")
        return pixels

    return prepare


def _sizes(processor, size: int) -> dict:
    """What to tell an image processor of transformers, so that it makes pictures of this size."""
    square = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size} if "shortest_edge" in processor.size else square}
    if crops := getattr(processor, "do_center_crop", False):
        sizes["crop_size"] = square
    own = processor.crop_size if crops else processor.size
    return {} if size in (own.get("height"), own.get("shortest_edge")) else sizes


def padding_to_square(size: int, normalization: Normalization) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (height, width, 3) -> float32 (size, size, 3), in a black square as `prepare` makes it, and normalised."""
    mean, std = np.array(normalization.mean, np.float32), np.array(normalization.std, np.float32)
    return lambda image: (fit(image, size).astype(np.float32) / 255 - mean) / std
