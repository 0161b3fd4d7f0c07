"""A Hugging Face checkpoint (ViT, DINOv2, DINOv2 with registers) -> parameters of our model."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np

from vit_nabirds.errors import UserError, shown, visible
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained import processor
from vit_nabirds.models.pretrained.hf_config import architecture_of, read_config, read_json
from vit_nabirds.models.pretrained.names import Row, check_tensors, mapping
from vit_nabirds.models.pretrained.positions import resize_positions
from vit_nabirds.models.pretrained.tensors import Tensor, read_tensors

LONGEST_LABEL, MOST_LABELS = 1_000, 1_000_000


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its tensors' names and shapes fit its configuration. No tensor is read yet."""

    source: str
    folder: Path
    architecture: dict  # arguments of VisionTransformer
    labels: list[str]  # one for each row of the classifier; empty without a classifier
    image_size: int  # pixels of its images; differs from the architecture's where the positions are to be resized
    normalization: Normalization
    pads_to_square: bool  # its images were fitted into a black square, as our exports say
    tensors: dict[str, Tensor]

    def load(self, architecture: dict, labels: list[str], place: Callable = lambda array: array) -> dict:
        """Parameters by path, float32. Gives each to `place` before reading the next.

        Resizes positions to `architecture`. Loads the classifier only if it has exactly these labels, and reorders it;
        without labels, none is wanted.
        """
        order, params = self._order_of(architecture, labels), {}
        old, new = _grids(self.architecture, architecture)
        for row in self._used(order):
            array = self.tensors[row.name].read()
            if row.path.startswith("classifier/"):
                array = array[order]
            elif row.path == "position_embeddings" and old != new:
                array = resize_positions(array, new, antialias=architecture["num_registers"] > 0)
            with np.errstate(over="ignore"):
                array = row.to_ours(array)
            if not np.isfinite(array).all():  # of float32: float64 has larger ones
                raise UserError(f"{self.source}: the tensor {row.name!r} has values that are not finite.")
            params[row.path] = place(array)
        return params

    def account(self, architecture: dict, labels: list[str]) -> str:
        """What `load` makes of the tensors, in words."""
        order = self._order_of(architecture, labels)
        used, (old, new) = [row.name for row in self._used(order)], _grids(self.architecture, architecture)
        dtypes = ", ".join(sorted({self.tensors[name].dtype for name in used}))
        return (
            f"weights of {self.source}\n  loaded   {len(used)} tensors ({dtypes})"
            f"\n  resized  {'none' if old == new else f'positions of {old} x {old} patches to {new} x {new}'}"
            f"\n  new      {'none' if order or not labels else 'the classifier'}"
            f"\n  ignored  {', '.join(map(visible, sorted(self.tensors.keys() - used))) or 'none'}"
        )

    def _used(self, order: list[int]) -> list[Row]:
        rows = mapping(self.architecture, len(self.labels))
        return [row for row in rows if order or not row.path.startswith("classifier/")]

    def _order_of(self, architecture: dict, labels: list[str]) -> list[int]:
        """The classifier's row for each label; empty if its labels or its input are others."""
        if architecture["pool"] != self.architecture["pool"]:
            return []
        if labels == self.labels:  # even with one label twice: ImageNet has two cranes
            return list(range(len(labels)))
        same = len(set(labels)) == len(labels) and set(labels) == set(self.labels)
        return [self.labels.index(label) for label in labels] if same else []

    def preprocessing(self, size: int) -> Callable[[np.ndarray], np.ndarray]:
        """uint8 (height, width, 3) -> float32 (size, size, 3), as in the checkpoint's training except for the size."""
        if self.pads_to_square:
            return processor.padding_to_square(size, self.normalization)
        return processor.preprocessing(self.folder, size)


def _grids(*architectures: dict) -> list[int]:
    """Patches on each side of an image."""
    return [a["image_size"] // a["patch_size"] for a in architectures]


def open_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a folder or Hub id; UserError names what is missing, misshaped, extra or not supported."""
    folder = find_checkpoint(name)
    hf, file = read_config(folder), folder / "preprocessor_config.json"
    images, tensors = read_json(file), read_tensors(folder)
    architecture = architecture_of(hf)
    labels = _labels(hf, tensors, folder / "config.json")
    check_tensors(tensors, architecture, len(labels), str(folder))
    size, normalization = processor.read_processor(images, hf, file)
    pads = bool(images.get(processor.PAD_TO_SQUARE))
    return Checkpoint(name, folder, architecture, labels, size, normalization, pads, tensors)


def _labels(hf: dict, tensors: dict[str, Tensor], file: Path) -> list[str]:
    if "classifier.weight" not in tensors:
        return []
    if len(shape := tensors["classifier.weight"].shape) != 2 or not 0 < shape[0] <= MOST_LABELS:
        raise UserError(f"{file.parent}: the tensor 'classifier.weight' has shape {shape}, which no classifier has.")
    rows = [str(row) for row in range(tensors["classifier.weight"].shape[0])]
    labels = hf.get("id2label", {row: f"LABEL_{row}" for row in rows})  # transformers leaves these names out
    if not isinstance(labels, dict) or labels.keys() != set(rows) or {type(x) for x in labels.values()} - {str}:
        raise UserError(
            f"{file}: the classifier has {len(rows)} rows, so id2label must give a label to each of 0 to "
            f"{len(rows) - 1}."
        )
    if long := [row for row in rows if len(labels[row]) > LONGEST_LABEL]:
        raise UserError(f"{file}: id2label gives {long[0]} a label of more than {LONGEST_LABEL} characters.")
    return [visible(labels[row]) for row in rows]


def find_checkpoint(name: str) -> Path:
    """The folder of a Hub id (ORG/MODEL or ORG/MODEL@REVISION, downloaded or cached) or of a local path."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{shown(name)} is a file: give the folder of the checkpoint.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"there is no folder {shown(name)}: give the folder of a checkpoint, or a Hub id like "
            "'google/vit-base-patch16-224' (with a revision: ID@REVISION)."
        )
    repository, _, revision = name.partition("@")
    patterns = ["README.md", "config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # each version of the Hub's client raises other types
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(
            f"the checkpoint {name!r} is not a local folder and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}). On a node without internet, download it on a "
            f"login node first (`hf download {repository}`), or give its folder."
        ) from None
