"""Photographs -> the species in them, by a run's checkpoint or a Hugging Face image classifier."""

import collections
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from vit_nabirds.data.crops import Box, cut, place
from vit_nabirds.data.pictures import MAX_PIXELS, Picture, open_picture
from vit_nabirds.data.thumbnails import thumbnail
from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.views import mean_logits
from vit_nabirds.evaluation.views import views as views_of
from vit_nabirds.models.model import describe
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.hf_config import read_json
from vit_nabirds.models.pretrained.processor import crop_of, padding_to_square
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.runs.checkpoints import sha256_of
from vit_nabirds.runs.loading import open_run

log = logging.getLogger("vit_nabirds")

Photograph = str | Path | bytes | Image.Image | np.ndarray


class Classifier:
    """Names the species in photographs: `for answer in Classifier(workdir="runs/birds")(["a.jpg", "b.jpg"]): ...`.

    Takes the `workdir` of a run (its selected checkpoint, or that of `step`), or as `model` the folder or Hub id of any
    image classifier, such as an exported run. Prepares images as those that it was trained on. Pictures of more than
    `max_pixels` are not read.
    """

    def __init__(
        self,
        *,
        workdir: str | Path | None = None,
        step: int | None = None,
        views: str | None = None,
        model: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        if (workdir is None) == (model is None) or (model and (step, views) != (None, None)):
            raise UserError("a Classifier takes a workdir, with or without a step and views, or a model.")
        if workdir:
            run = open_run(Path(workdir), step).seen_in(views)
            self.species, self._mesh, self._params, network = run.metadata.species, run.mesh, run.params, run.model
            size, pads = run.metadata.architecture["image_size"], True
            self._prepare = padding_to_square(size, run.metadata.normalization)
            crop, kind = run.metadata.crop, run.metadata.config["evaluate"]["views"]
        else:
            checkpoint = open_checkpoint(str(model))
            if not checkpoint.labels:
                raise UserError(f"{model} has no classifier: train one, with it as config.model.pretrained.")
            self.species, self._mesh = checkpoint.labels, devices.make_mesh()
            size, pads = checkpoint.image_size, checkpoint.pads_to_square
            architecture = checkpoint.architecture | {"image_size": size}
            log.info(checkpoint.account(architecture, self.species))
            self._params = checkpoint.load(architecture, self.species, lambda x: devices.replicate(x, self._mesh))
            network = describe(architecture, len(self.species))
            self._prepare = checkpoint.preprocessing(size)
            crop, kind = crop_of(read_json(checkpoint.folder / "preprocessor_config.json")), "one"
        self._size, self._pads, self._kind = size, pads, kind
        self._max_pixels, self._crop = max_pixels, crop

        def top_probabilities(params: dict, images: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
            logits = mean_logits(lambda x: network.logits(params, x), views_of(images, kind))
            return jax.lax.top_k(jax.nn.softmax(logits), topk)

        self._top = network.jit(top_probabilities, static_argnums=2)

    def __call__(
        self,
        images: Photograph | Iterable[Photograph],
        topk: int = 5,
        find: Callable[[Photograph, Picture], list[Box | None]] | None = None,
        thumbnails: bool = False,
    ) -> Iterator[dict]:
        """A dict for each image, in order, lazily: `file`, `species` and `probability` (lists, the likeliest first) and
        `problem`: None, or why the image cannot be read; its lists are then empty.

        An image is a path, the bytes of a file, a PIL image, or an array, uint8 (height, width, 3). `find` (image,
        picture) lists the boxes in it: (left, top, width, height) in pixels of the upright picture, None for all of it;
        or raises an exception that says why there is none. There is then a dict for each box, with the part of it that
        lies in the picture, in whole pixels, as `box`. `thumbnail` is None, or with
        `thumbnails` the URI of a small JPEG of what the model saw.
        """
        if topk < 1:
            raise UserError(f"topk is {topk}: ask for at least one species.")
        if isinstance(images, str | Path | bytes | Image.Image) or isinstance(images, np.ndarray) and images.ndim < 4:
            images = [images]
        self._warn_of_others(find is not None)
        topk = min(topk, len(self.species))
        batch_size = (8 if jax.default_backend() == "cpu" else 64) * self._mesh.size
        crops = self._crops(images, find, 2 * batch_size, thumbnails)
        while chunk := list(itertools.islice(crops, batch_size)):
            yield from self._predict(chunk, topk, batch_size)

    @property
    def fingerprint(self) -> str:
        """Of what decides its answers. Large arrays are left out: no training changes them without these."""
        small = {path: x for path, x in self._params.items() if x.ndim == 1 or path.startswith("classifier/")}
        words = [f"{path} {sha256_of(x)}" for path, x in sorted(small.items())] + [self._kind, str(self._size)]
        return hashlib.sha256("\n".join([*words, *self.species]).encode()).hexdigest()[:16]

    def _warn_of_others(self, cropped: bool) -> None:
        """Once, where pictures are not what the model was trained on."""
        if self._crop == "box" and not cropped:
            log.warning(
                "the model has learned birds that were cut out of their photographs: it knows them best in pictures "
                "cropped to the bird (`predict --boxes=FILE` crops photographs)"
            )
        elif self._crop == "none" and cropped:
            log.warning("the model has learned whole photographs, and is shown the birds cut out of them")
        self._crop = None

    def _crops(
        self, images: Iterable[Photograph], find: Callable | None, ahead: int, thumbnails: bool
    ) -> Iterator[tuple]:
        """(image, more of the answer, pixels or problem) for each box, while the next `ahead` images are being read."""
        images, waiting = iter(images), collections.deque()
        with ThreadPoolExecutor(cpu_share()) as pool:
            while True:
                for image in itertools.islice(images, ahead - len(waiting)):
                    waiting.append((image, pool.submit(self._read, image, find, thumbnails)))
                if not waiting:
                    return
                image, job = waiting.popleft()
                yield from ((image, more, pixels) for more, pixels in job.result())

    def _read(
        self, image: Photograph, find: Callable | None, thumbnails: bool = False
    ) -> list[tuple[dict, np.ndarray | str]]:
        """Each box of the image as the answer has it, and what is in it: float32 (size, size, 3), normalised; or
        what is wrong with it."""
        try:
            picture = open_picture(image, self._max_pixels)
            boxes = [None] if find is None else find(image, picture)
            if not boxes:
                raise ValueError("no box")
        except Exception as error:  # noqa: BLE001, because a damaged file makes a decoder raise anything
            return [({"box": None, "thumbnail": None}, _reason(error))]
        return [self._cut(picture, box, thumbnails) for box in boxes]

    def _cut(self, picture: Picture, box: Box | None, thumbnails: bool) -> tuple[dict, np.ndarray | str]:
        small = None
        try:
            crop = place(picture.size, box, self._size)
            left, top, right, bottom = crop.region
            box = box and (left, top, right - left, bottom - top)
            # Other models' own preprocessing resizes, so it gets all pixels.
            pixels = cut(picture, crop) if self._pads else picture.read()[top:bottom, left:right]
            if thumbnails:
                x, y, end, below = crop.canvas if self._pads else (0, 0, *pixels.shape[1::-1])
                small = thumbnail(pixels[y:below, x:end])
            return {"box": box, "thumbnail": small}, self._prepare(pixels)
        except Exception as error:  # noqa: BLE001
            return {"box": box, "thumbnail": small}, _reason(error)

    def _predict(self, crops: list[tuple], topk: int, batch_size: int) -> Iterator[dict]:
        good = [pixels for _, _, pixels in crops if not isinstance(pixels, str)]
        likeliest = iter(())
        if good:
            filled = np.stack(good + [np.zeros_like(good[0])] * (batch_size - len(good)))
            batch = devices.to_devices({"image": filled}, self._mesh)
            likeliest = zip(*jax.device_get(self._top(self._params, batch["image"], topk)), strict=True)
        for image, more, pixels in crops:
            answer = {"file": str(image) if isinstance(image, str | Path) else None} | more
            if isinstance(pixels, str):
                yield answer | {"species": [], "probability": [], "problem": pixels}
            else:
                probabilities, labels = next(likeliest)
                species = [self.species[label] for label in labels]
                yield answer | {"species": species, "probability": probabilities.tolist(), "problem": None}


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
