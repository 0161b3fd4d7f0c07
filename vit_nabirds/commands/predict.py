"""Photographs -> the species in them, by a run's checkpoint or a Hugging Face image classifier."""

import collections
import contextlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import jax
import numpy as np
import polars as pl
from PIL import Image, ImageOps
from tqdm import tqdm

from vit_nabirds.data.images import open_picture
from vit_nabirds.data.prepare import fit
from vit_nabirds.errors import UserError
from vit_nabirds.models.pretrained import checkpoint as weights
from vit_nabirds.models.vit import apply, describe, jit
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.cpus import cpu_share
from vit_nabirds.runs.loading import open_run

log = logging.getLogger("vit_nabirds")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
COLUMNS = {"file": pl.String, "rank": pl.Int32, "species": pl.String, "probability": pl.Float32, "problem": pl.String}


class Classifier:
    """Names what photographs show: `for answer in Classifier(workdir="runs/birds")(["a.jpg", "b.jpg"], topk=3): ...`.

    Of a run, by its best checkpoint or that of `step`; or by the `model` of a folder or Hub id, an exported one or
    another. Images are prepared as those were that it was trained on.
    """

    def __init__(self, *, workdir: str | Path | None = None, step: int | None = None, model: str | Path | None = None):
        if (workdir is None) == (model is None) or (step is not None and model):
            raise UserError("a Classifier is of a workdir, with or without a step, or of a model.")
        if workdir:
            run = open_run(Path(workdir), step)
            self.species, self._mesh = run.about.species, run.mesh
            self._graphdef, self._params = run.graphdef, run.params
            size, normalization = run.about.architecture["img_size"], run.about.normalization
            self._prepare = lambda image: _pad_to_square(image, size, normalization)
        else:
            checkpoint = weights.open_checkpoint(str(model))
            if not checkpoint.labels:
                raise UserError(f"{model} has no classifier: train one, with it as config.model.pretrained.")
            self.species, self._mesh = checkpoint.labels, devices.make_mesh()
            architecture = checkpoint.architecture | {"img_size": checkpoint.image_size}
            self._graphdef, _ = describe(architecture, len(self.species))
            self._params = checkpoint.load(architecture, self.species, lambda x: devices.replicate(x, self._mesh))
            self._prepare = preprocessing(checkpoint, checkpoint.image_size)
        self._top = jit(self._top_probabilities, static_argnums=2)

    def __call__(self, images: Iterable[str | Path | Image.Image | np.ndarray], topk: int = 5) -> Iterator[dict]:
        """A dict for each image, in order, read as it is asked for: `file`, `species` and `probability` (lists of the
        topk likeliest) and `problem`: None, or why the image cannot be read, and then the lists are empty."""
        if topk < 1:
            raise UserError(f"topk is {topk}: name at least one species.")
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
        except Exception as error:  # noqa: BLE001, for a damaged file makes a decoder raise anything
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

    def _top_probabilities(self, params: dict, images: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
        return jax.lax.top_k(jax.nn.softmax(apply(self._graphdef, params, images)), topk)


def read_image(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """RGB, upright; an array is uint8 (height, width, 3)."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    with contextlib.nullcontext(image) if isinstance(image, Image.Image) else open_picture(image) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a pixel, convert it to 8")
        return ImageOps.exif_transpose(opened).convert("RGB")


def preprocessing(checkpoint: weights.Checkpoint, size: int) -> Callable[[Image.Image], np.ndarray]:
    """RGB image -> float32 (size, size, 3), as the checkpoint's preprocessor_config.json says but for the size."""
    if checkpoint.pads_to_square:
        return lambda image: _pad_to_square(image, size, checkpoint.normalization)
    from transformers import AutoImageProcessor  # takes a second

    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint.folder, use_fast=False)
    except Exception as error:  # transformers has no family of errors of its own
        raise UserError(f"{checkpoint.folder}: AutoImageProcessor says: {str(error).splitlines()[0]}") from None
    square = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size} if "shortest_edge" in processor.size else square}
    if crops := getattr(processor, "do_center_crop", False):
        sizes["crop_size"] = square
    own = processor.crop_size if crops else processor.size
    sizes = {} if size in (own.get("height"), own.get("shortest_edge")) else sizes
    options = sizes | {"return_tensors": "np", "input_data_format": "channels_last"}
    return lambda image: processor(images=np.asarray(image), **options)["pixel_values"][0].transpose(1, 2, 0)


def _pad_to_square(image: Image.Image, size: int, normalization) -> np.ndarray:
    pixels = fit(np.asarray(image), size).astype(np.float32) / 255
    return (pixels - np.array(normalization.mean, np.float32)) / np.array(normalization.std, np.float32)


def predict(images: Path, out: Path, topk: int = 5, **source) -> int:
    """Write a row for each photograph and rank to `out`, complete or not at all; returns the exit code.

    `source` are the arguments of `Classifier`.
    """
    if out.suffix not in (".csv", ".jsonl", ".parquet"):
        raise UserError(f"--out={out}: its name must end in .csv, .jsonl or .parquet.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.absolute().parent}.")
    if out.is_dir():
        raise UserError(f"--out={out} is a folder: give the name of a file.")
    files = find_images(images)
    classifier = Classifier(**source)
    cv2.setNumThreads(1)  # the threads that read are as many as there are cores
    problems = 0
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as unfinished:
        rows = Path(unfinished) / "rows"
        opened = rows.open("w")
        for answer in tqdm(classifier(files, topk), total=len(files), unit=" images", disable=None):
            answer["file"] = os.fsencode(answer["file"]).decode(errors="replace")
            for rank, (species, probability) in enumerate(zip(answer["species"], answer["probability"], strict=True)):
                row = {"file": answer["file"], "rank": rank + 1, "species": species, "probability": probability}
                opened.write(json.dumps(row | {"problem": None}) + "\n")
            if answer["problem"]:
                problems += 1
                row = dict.fromkeys(COLUMNS) | {"file": answer["file"], "problem": answer["problem"]}
                opened.write(json.dumps(row) + "\n")
        opened.close()
        finished = rows
        if out.suffix != ".jsonl":
            finished, table = Path(unfinished) / "table", pl.scan_ndjson(rows, schema=COLUMNS)
            table.sink_csv(finished) if out.suffix == ".csv" else table.sink_parquet(finished)
        finished.replace(out)
    log.info("%s: %d photographs, at most %d species for each", out, len(files) - problems, topk)
    if problems:
        log.warning("%d of %d files cannot be read: the column 'problem' of %s says why", problems, len(files), out)
    return 1 if problems == len(files) else 0


def find_images(path: Path) -> list[Path]:
    """The file, or all images in the folder and those below, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--images={path}: there is no such file or folder.")
    files = sorted(file for file in path.rglob("*") if file.is_file() or file.is_symlink() and not file.exists())
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise UserError(f"--images={path}: none of its {len(files)} files ends in {', '.join(SUFFIXES)}.")
    if others := len(files) - len(images):
        log.info("%s: %d files of other kinds are left out", path, others)
    return images
