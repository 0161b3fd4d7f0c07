"""Compare our logits for a Hugging Face checkpoint with those of transformers."""

import logging
import random
from pathlib import Path

from vit_nabirds.errors import ConfigError, UserError, quoted

log = logging.getLogger("vit_nabirds")

REQUIRED = ("checkpoint",)
FLAGS = {
    "checkpoint": (str, "Folder or Hub id of a checkpoint."),
    "image": ([], "Picture to compare on; may be given several times (default: a drawn bird)."),
    "figure": (str, "File for the pictures with both answers, side by side."),
    "tolerance": (1e-4, "Largest difference of logits that counts as the same."),
}
PARALLEL = False
CONFIGURED = ""


def run(options, group) -> int:
    figure = options.figure and Path(options.figure)
    return verify(options.checkpoint, options.image, figure, options.tolerance)


def verify(name: str, images: list[str], figure: Path | None, tolerance: float) -> int:
    """Print both top-5s and the largest difference of the logits (without a classifier: of the final class token).

    Returns 1 when the difference is above the tolerance, else 0.
    """
    import numpy as np
    from PIL import Image

    from vit_nabirds.evaluation.reference import load_reference, outputs, top5
    from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
    from vit_nabirds.runs.pictures import draw_row

    if not tolerance >= 0:
        raise ConfigError(f"--tolerance={tolerance}: give a number of at least 0.")
    if figure and (figure.suffix.lower() not in Image.registered_extensions() or not figure.absolute().parent.is_dir()):
        raise ConfigError(f"--figure={figure}: give a file in a folder that exists, with a name that ends like .png.")
    pictures = read_pictures(images)
    checkpoint = open_checkpoint(name)
    log.info(checkpoint.account(checkpoint.architecture, checkpoint.labels))
    reference, kind = load_reference(checkpoint)
    size = checkpoint.architecture["image_size"]  # its own, because one of the references resizes positions differently
    prepare = checkpoint.preprocessing(size)
    pixels = np.stack([prepare(picture) for picture in pictures])
    theirs, ours = reference(pixels), outputs(checkpoint, pixels)
    what = "logits" if checkpoint.labels else "class token's features"
    print(f"{name}: {what} of {len(pixels)} picture(s) at {size} px, {kind} beside ours")
    captions = []
    for image, *both in zip(images or ["a drawn bird"], theirs, ours, strict=True):
        print(image)
        best = [[(quoted(label), p) for label, p in top5(logits, checkpoint.labels)] for logits in both]
        for (label, p), (our_label, our_p) in zip(*best, strict=True):
            print(f"  {p:.4f} {label:40.40} {our_p:.4f} {our_label:.40}")
        for title, answers in zip(("reference", "ours"), best, strict=True):
            captions.append((title, f"{answers[0][0]} p={answers[0][1]:.4f}" if answers else ""))
    if figure:
        scale = checkpoint.normalization
        shown = np.repeat(pixels * np.array(scale.std) + np.array(scale.mean), 2, axis=0)
        rows = [draw_row(shown[i : i + 2], captions[i : i + 2]) for i in range(0, len(shown), 2)]
        Image.fromarray(np.concatenate(rows)).save(figure)
        print(f"figure: {figure}")
    difference = float(np.abs(theirs - ours).max())
    same = difference <= tolerance
    print(f"largest difference {difference:.2g}: {'within' if same else 'ABOVE'} the tolerance of {tolerance:g}")
    return 0 if same else 1


def read_pictures(images: list[str]) -> list:
    """The pictures as uint8 (height, width, 3), or a drawn bird if there are none."""
    from vit_nabirds.data.pictures import open_picture
    from vit_nabirds.data.synthetic import PLUMAGES, draw_bird

    pictures = []
    for image in images:
        try:
            pictures.append(open_picture(image).read())
        except Exception as error:  # a damaged file makes a decoder raise anything
            raise UserError(f"--image={image} cannot be read: {quoted(error)}") from None
    return pictures or [open_picture(draw_bird(PLUMAGES[0], 640, 480, random.Random(0))[0]).read()]
