"""The test photographs of a run, small, each with its photographer, whom NABirds asks to name wherever one is shown."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.table import BIRD, read_table
from vit_nabirds.data.taxonomy import Taxonomy, read_taxonomy
from vit_nabirds.data.thumbnails import thumbnail
from vit_nabirds.errors import UserError

log = logging.getLogger("vit_nabirds")


class Photograph(NamedTuple):
    uri: str
    photographer: str


class Album:
    """Of the prepared folder `root` that a run was trained on, with its `label`. Without it the album is empty, and
    `problem` says why."""

    def __init__(self, root: Path, label: str) -> None:
        self.problem, self.taxonomy, self._rows = "", None, {}
        try:
            table = read_table(root, label)
            self._photographs = open_split(root, table, "test")
            self.taxonomy: Taxonomy | None = read_taxonomy(root, table)
        except UserError as error:
            self.problem = str(error)
            return
        chosen = table.with_row_index("row").filter(split="test").with_row_index("index")
        self._rows = {row["path"]: row for row in chosen.iter_rows(named=True)}

    def find(self, path: str, label: str) -> Photograph | None:
        """None where the folder has no such photograph of that class, or it cannot be read."""
        row = self._rows.get(path)
        if row is None or row["class_name"] != label:  # the folder holds other data now
            return None
        pixels = np.empty((self._photographs.size,) * 2 + (3,), np.uint8)
        try:
            self._photographs.read(row["index"], pixels)
        except UserError as error:
            log.warning("%s", error)
            return None
        if BIRD[0] in row:  # without the black that fills the square
            left, top, width, height = (max(row[name], 0) for name in BIRD)
            cut = pixels[top : top + height, left : left + width]
            pixels = cut if cut.size else pixels
        return Photograph(thumbnail(np.ascontiguousarray(pixels)), row["photographer"] or "photographer unknown")
