"""The photographs of one split, with labels, for random access; and whether a model can be trained on them."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl

from vit_nabirds.data.crops import fit
from vit_nabirds.data.images import ImageFiles, PackedImages, open_images
from vit_nabirds.data.table import BIRD
from vit_nabirds.errors import UserError, quoted

SPLITS = {"train": "training", "validation": "validation", "test": "test"}  # and what they are called


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The images of a split: for each its index in `images`, its label in [0, number of classes) and its row in the
    table, all int32 (n,); and for those that are held out of the training images, where the bird is in it."""

    images: ImageFiles | PackedImages
    indices: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    size: int  # height and width of every image in pixels
    birds: np.ndarray | None = None  # int32 (n, 4): left, top, width, height in pixels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.images, PackedImages)

    def path(self, index: int) -> str:
        return self.images.paths[int(self.indices[index])]

    def read(self, index: int, out: np.ndarray) -> None:
        """Read an image into `out`, uint8 (size, size, 3); UserError if it cannot be read."""
        if self.birds is None:
            return self.images.read(self.indices[index], out)
        image = np.empty((self.images.size, self.images.size, 3), np.uint8)
        self.images.read(self.indices[index], image)
        left, top, width, height = self.birds[index]
        out[:] = fit(image[top : top + height, left : left + width], self.size)


def open_split(root: Path, table: pl.DataFrame, split: str, ignore_pack: bool = False) -> Photographs:
    """The photographs of "train", "validation" or "test". No image is opened.

    Those of "validation" are training images, cut to the bird and fitted as test images are.
    """
    is_train = split != "test"
    chosen = table.with_row_index("row").filter(pl.col("is_training_img") == is_train).with_row_index("index")
    chosen = chosen.filter(pl.col("split") == split)
    if chosen.is_empty():
        advice = "prepare the archive again, with --test_share=0.2" if split == "test" else "prepare one that has some"
        raise UserError(f"{root / 'metadata.parquet'} has no {SPLITS[split]} images: {advice}.")
    images = open_images(root, table, is_train, ignore_pack)
    numbers = [chosen[name].to_numpy().astype(np.int32) for name in ("index", "label", "row")]
    if split != "validation":
        return Photographs(images, *numbers, images.size)
    size = open_images(root, table, False, ignore_pack).size
    if BIRD[0] in chosen.columns:
        birds = chosen.select(BIRD).to_numpy().astype(np.int32)
        ends = birds[:, :2].astype(np.int64) + birds[:, 2:]
        if birds[:, :2].min() < 0 or birds[:, 2:].min() < 1 or ends.max() > images.size:
            raise UserError(f"{root / 'metadata.parquet'} has a bird outside of its image: prepare the folder again.")
    else:  # of the course: the middle of the image, as large as a test image
        margin = max(images.size - size, 0) // 2
        side = images.size - 2 * margin
        birds = np.tile(np.int32([margin, margin, side, side]), (len(chosen), 1))
    return Photographs(images, *numbers, size, birds)


def check_labels(photographs: Photographs, num_classes: int) -> None:
    """Raise UserError for a label outside the model's classes, which would silently make the loss NaN."""
    wrong = np.flatnonzero((photographs.labels < 0) | (photographs.labels >= num_classes))
    if len(wrong):
        row, label = photographs.rows[wrong[0]], photographs.labels[wrong[0]]
        raise UserError(
            f"row {row} ({quoted(photographs.path(wrong[0]))}) has label {label}, but the model has {num_classes} "
            f"classes (0 to {num_classes - 1})."
        )


def check_sizes(image_size: int, test: Photographs, train: Photographs | None = None) -> None:
    """Raise UserError if test images do not fit the model, or training images are too small for its crops."""
    if test.size != image_size or (train and train.size < image_size):
        sizes = (f"training images are {train.size} px and " if train else "") + f"test images are {test.size} px"
        flags = (f"--train_size={round(1.2 * image_size)} " if train else "") + f"--test_size={image_size}"
        raise UserError(
            f"{test.images.folder}: {sizes}, but the model takes {image_size}: prepare the photographs with {flags}."
        )
