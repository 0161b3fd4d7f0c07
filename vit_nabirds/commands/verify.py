"""A checkpoint -> does our model compute what Hugging Face's computes, on the same pictures?"""

import contextlib
import importlib.util
import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from vit_nabirds.commands.export import CLASSES
from vit_nabirds.commands.predict import preprocessing, read_image
from vit_nabirds.data.synthetic import PLUMAGES, draw_bird
from vit_nabirds.errors import UserError
from vit_nabirds.models import vit as model
from vit_nabirds.models.pretrained import checkpoint as weights
from vit_nabirds.runs.tracker import draw_grid

log = logging.getLogger("vit_nabirds")


def verify(name: str, images: list[str], figure: Path | None, tolerance: float) -> int:
    """Print both top-5s and the largest difference of the logits (without a classifier: of the final class token);
    returns 1 when it is above the tolerance."""
    if not tolerance >= 0:
        raise UserError(f"--tolerance={tolerance}: give a number of at least 0.")
    if figure and (figure.suffix.lower() not in Image.registered_extensions() or not figure.absolute().parent.is_dir()):
        raise UserError(f"--figure={figure}: give a file in a folder that exists, with a name that ends like .png.")
    pictures = []
    for image in images:
        try:
            pictures.append(read_image(image))
        except Exception as error:  # a damaged file makes a decoder raise anything
            raise UserError(f"--image={image} cannot be read: {error}") from None
    pictures = pictures or [draw_bird(PLUMAGES[0], 640, 480, random.Random(0))[0]]
    checkpoint = weights.open_checkpoint(name)
    reference, kind = load_reference(checkpoint)
    # At the resolution of its positions, for one of the references resizes them in a way of its own.
    size = checkpoint.architecture["img_size"]
    prepare = preprocessing(checkpoint, size)
    pixels = np.stack([prepare(picture) for picture in pictures])
    theirs, ours = reference(pixels), outputs(checkpoint, pixels)
    difference = float(np.abs(theirs - ours).max())
    what = "logits" if checkpoint.labels else "class token's features"
    print(f"{name}: {what} of {len(pixels)} picture(s) at {size} px, {kind} beside ours")
    captions = []
    for image, *both in zip(images or ["a drawn bird"], theirs, ours, strict=True):
        print(image)
        best = [top5(logits, checkpoint.labels) for logits in both]
        for (label, p), (our_label, our_p) in zip(*best, strict=True):
            print(f"  {p:.4f} {label:40.40} {our_p:.4f} {our_label:.40}")
        for title, answers in zip(("reference", "ours"), best, strict=True):
            captions.append((title, f"{answers[0][0]} p={answers[0][1]:.4f}" if answers else ""))
    if figure:
        scale = checkpoint.normalization
        shown = np.repeat(pixels * np.array(scale.std) + np.array(scale.mean), 2, axis=0)
        Image.fromarray(draw_grid(shown, captions, columns=2)).save(figure)
        print(f"figure: {figure}")
    same = difference <= tolerance
    print(f"largest difference {difference:.2g}: {'within' if same else 'ABOVE'} the tolerance of {tolerance:g}")
    return 0 if same else 1


def top5(logits: np.ndarray, labels: list[str]) -> list[tuple[str, float]]:
    """The likeliest labels with their probabilities; none for a checkpoint without a classifier."""
    p = np.exp(logits - logits.max())
    return [(labels[i], p[i] / p.sum()) for i in np.argsort(-logits)[:5]] if labels else []


def outputs(checkpoint: weights.Checkpoint, pixels: np.ndarray) -> np.ndarray:
    """Our logits, or the final class token of a checkpoint without a classifier."""
    architecture = checkpoint.architecture | ({} if checkpoint.labels else {"pool": "cls"})
    graphdef, shapes = model.describe(architecture, max(len(checkpoint.labels), 1))
    params = checkpoint.load(architecture, checkpoint.labels)
    if checkpoint.labels:
        return np.asarray(model.jit(lambda p, x: model.apply(graphdef, p, x))(params, pixels))
    params |= {path: jnp.zeros(shapes[path].shape) for path in shapes if path not in params}
    return np.asarray(model.jit(lambda p, x: model.bind(graphdef, p).features(x))(params, pixels))


def load_reference(checkpoint: weights.Checkpoint) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """transformers' model, (batch, size, size, 3) -> what `outputs` gives of ours; and the name of its class."""
    import transformers

    transformers.logging.set_verbosity_error()
    name = CLASSES[weights.family(checkpoint.architecture)]
    if not checkpoint.labels:
        name = name.replace("ForImageClassification", "Model")

    def output(answer):
        return answer.logits if checkpoint.labels else answer.last_hidden_state[:, 0]

    def load(cls, **options):
        with contextlib.suppress(Exception):  # shards, other names of files or tensors: not every class reads them
            return cls.from_pretrained(checkpoint.folder, **options)
        # From one file, with PyTorch's names.
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(checkpoint.folder / "config.json", folder)
            prefix = "" if not checkpoint.labels else weights.family(checkpoint.architecture) + "."
            tensors = {
                key if key.startswith("classifier.") else prefix + key: np.ascontiguousarray(tensor.read())
                for key, tensor in checkpoint.tensors.items()
            }
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            try:
                return cls.from_pretrained(folder, **options)
            except Exception as error:  # transformers has no family of errors of its own
                message = str(error).strip().splitlines()[0]
                raise UserError(f"transformers' {cls.__name__} cannot load {checkpoint.folder}: {message}") from None

    if flax := getattr(transformers, f"Flax{name}", None):
        network = load(flax)
        forward = jax.jit(lambda params, x: output(network(pixel_values=x, params=params)))
        return lambda pixels: np.asarray(forward(network.params, pixels.transpose(0, 3, 1, 2))), f"Flax{name}"
    if importlib.util.find_spec("torch"):
        import torch

        network = load(getattr(transformers, name), dtype=torch.float32).eval()

        def forward(pixels: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return output(network(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))).numpy()

        return forward, name
    raise UserError(
        f"there is no reference to verify with: transformers {transformers.__version__} has no Flax{name}, and torch "
        "is not installed (`pip install torch`, or transformers 4 for the ViTs and DINOv2s without registers)."
    )
