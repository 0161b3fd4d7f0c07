"""Photographs -> the species in them, by a run's checkpoint or a Hugging Face image classifier."""

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from vit_nabirds.data.images import open_picture, to_rgb
from vit_nabirds.errors import UserError
from vit_nabirds.models.model import describe
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.processor import padding_to_square
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.runs.loading import open_run


class Classifier:
    """Names the species in photographs: `for answer in Classifier(workdir="runs/birds")(["a.jpg", "b.jpg"]): ...`.

    Takes the `workdir` of a run (its best checkpoint, or that of `step`), or as `model` the folder or Hub id of any
    image classifier, such as an exported run. Prepares images as those that it was trained on.
    """

    def __init__(self, *, workdir: str | Path | None = None, step: int | None = None, model: str | Path | None = None):
        if (workdir is None) == (model is None) or (step is not None and model):
            raise UserError("a Classifier takes a workdir, with or without a step, or a model.")
        if workdir:
            run = open_run(Path(workdir), step)
            self.species, self._mesh, self._params, network = run.metadata.species, run.mesh, run.params, run.model
            self._prepare = padding_to_square(run.metadata.architecture["image_size"], run.metadata.normalization)
        else:
            checkpoint = open_checkpoint(str(model))
            if not checkpoint.labels:
                raise UserError(f"{model} has no classifier: train one, with it as config.model.pretrained.")
            self.species, self._mesh = checkpoint.labels, devices.make_mesh()
            architecture = checkpoint.architecture | {"image_size": checkpoint.image_size}
            self._params = checkpoint.load(architecture, self.species, lambda x: devices.replicate(x, self._mesh))
            network = describe(architecture, len(self.species))
            self._prepare = checkpoint.preprocessing(checkpoint.image_size)

        def top_probabilities(params: dict, images: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
            return jax.lax.top_k(jax.nn.softmax(network.logits(params, images)), topk)

        self._top = network.jit(top_probabilities, static_argnums=2)

    def __call__(self, images: Iterable[str | Path | Image.Image | np.ndarray], topk: int = 5) -> Iterator[dict]:
        """A dict for each image, in order, lazily: `file`, `species` and `probability` (lists, the likeliest first) and
        `problem`: None, or why the image cannot be read; its lists are then empty."""
        if topk < 1:
            raise UserError(f"topk is {topk}: ask for at least one species.")
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        topk = min(topk, len(self.species))
        batch_size = (8 if jax.default_backend() == "cpu" else 64) * self._mesh.size
        images, waiting = iter(images), collections.deque()
        with ThreadPoolExecutor(cpu_share()) as pool:
            while True:
                while len(waiting) < 2 and (chunk := list(itertools.islice(images, batch_size))):
                    waiting.append((chunk, [pool.submit(self._read, image) for image in chunk]))
                if not waiting:
                    return
                chunk, reading = waiting.popleft()
                pixels = [job.result() for job in reading]
                yield from self._predict(chunk, pixels, topk, batch_size)

    def _read(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray | str:
        """float32 (size, size, 3), normalised; or what is wrong with the image."""
        try:
            return self._prepare(read_image(image))
        except Exception as error:  # noqa: BLE001, because a damaged file makes a decoder raise anything
            return str(error) or type(error).__name__

    def _predict(self, images: list, pixels: list, topk: int, batch_size: int) -> Iterator[dict]:
        good = [array for array in pixels if not isinstance(array, str)]
        likeliest = iter(())
        if good:
            filled = np.stack(good + [np.zeros_like(good[0])] * (batch_size - len(good)))
            batch = devices.to_devices({"image": filled}, self._mesh)
            likeliest = zip(*jax.device_get(self._top(self._params, batch["image"], topk)), strict=True)
        for image, array in zip(images, pixels, strict=True):
            answer = {"file": str(image) if isinstance(image, str | Path) else None}
            if isinstance(array, str):
                yield answer | {"species": [], "probability": [], "problem": array}
            else:
                probabilities, labels = next(likeliest)
                species = [self.species[label] for label in labels]
                yield answer | {"species": species, "probability": probabilities.tolist(), "problem": None}


def read_image(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3), upright. An array must already be that. Leaves a given image open."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    with contextlib.nullcontext(image) if isinstance(image, Image.Image) else open_picture(image) as opened:
        return to_rgb(ImageOps.exif_transpose(opened))
