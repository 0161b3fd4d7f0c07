"""The photographs of one split, with labels, for random access; and whether a model can be trained on them."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl

from vit_nabirds.data.images import ImageFiles, PackedImages, open_images
from vit_nabirds.errors import UserError


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The images of a split, their labels in [0, number of species) and their rows in the table, both int32 (n,)."""

    images: ImageFiles | PackedImages
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width of every image in pixels."""
        return self.images.size

    @property
    def is_packed(self) -> bool:
        return isinstance(self.images, PackedImages)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """For int indices (n,): image, uint8 (n, size, size, 3), and label and row, int32 (n,)."""
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for index, image in zip(indices, images, strict=True):
            self.images.read(index, image)
        return {"image": images, "label": self.labels[indices], "row": self.rows[indices]}


def open_split(root: Path, table: pl.DataFrame, train: bool, ignore_pack: bool = False) -> Photographs:
    """The train or test photographs from the folder's pack, or else from its image files, after a look at each."""
    split = table.with_row_index("row").filter(pl.col("is_training_img") == train)
    if split.is_empty():
        raise UserError(f"{root / 'metadata.parquet'} has no {'training' if train else 'test'} images.")
    labels, rows = (split[name].to_numpy().astype(np.int32) for name in ("species_id", "row"))
    return Photographs(open_images(root, split["path"].to_list(), train, ignore_pack), labels, rows)


def check_labels(photographs: Photographs, num_classes: int) -> None:
    """Raise UserError for a label outside the model's classes, which would silently make the loss NaN."""
    wrong = np.flatnonzero((photographs.labels < 0) | (photographs.labels >= num_classes))
    if len(wrong):
        label, row = photographs.labels[wrong[0]], photographs.rows[wrong[0]]
        raise UserError(
            f"row {row} ({photographs.images.paths[wrong[0]]}) has label {label}, but the model has {num_classes} "
            f"classes (0 to {num_classes - 1})."
        )


def check_sizes(train: Photographs, test: Photographs, image_size: int) -> None:
    """Raise UserError if training images are too small for the model's crops or test images do not fit it."""
    if train.size < image_size or test.size != image_size:
        raise UserError(
            f"{train.images.folder}: training images are {train.size} px and test images {test.size} px, but the model "
            f"takes {image_size}: prepare one with --train_size={round(1.2 * image_size)} --test_size={image_size}."
        )
