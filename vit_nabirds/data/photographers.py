"""Who took the photographs of an archive or a prepared folder: they are named wherever a photograph is shown."""

import os
from pathlib import Path

import polars as pl

from vit_nabirds.data.archives import read_archive
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import UserError

ABOVE = 3  # folders, above the photographs, in which the names are looked for


def photographers_of(images: Path) -> dict[str, str]:
    """Name by absolute path, if a photograph or a folder of them lies in such a folder; empty where nobody is named."""
    inside = Path(os.path.abspath(images))
    for folder in [inside, *inside.parents][: ABOVE + 1]:
        try:
            if (folder / "metadata.parquet").is_file():
                return _by_path(folder / "cleaned_images", read_table(folder), "path")
            if (folder / "photographers.txt").is_file():
                archive = read_archive(folder)
                return _by_path(archive.folder, archive.table, "source")
        except UserError:  # of other files with these names
            continue
    return {}


def _by_path(folder: Path, table: pl.DataFrame, column: str) -> dict[str, str]:
    named = table.select(column, "photographer").drop_nulls()
    return {os.path.abspath(folder / path): name for path, name in named.iter_rows()}
