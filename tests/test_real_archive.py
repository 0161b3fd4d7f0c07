"""The real archive's text files as a prepared folder, where they are at hand."""

import shutil
from collections import Counter

import polars as pl
import pytest
from conftest import SHARED

from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.table import class_names, read_table
from vit_nabirds.data.taxonomy import read_taxonomy


def test_the_real_archive_has_its_404_species_and_555_categories_in_a_tree(tmp_path):
    archive = SHARED / "nabirds_metadata.tar.xz"
    if not archive.exists():
        pytest.skip("set VIT_NABIRDS_SHARED to a folder with nabirds_metadata.tar.xz, the archive's text files")
    shutil.unpack_archive(archive, tmp_path / "texts")
    prepare(next(tmp_path.rglob("images.txt")).parent, tmp_path / "p", metadata_only=True)
    for label, count, depths in (("category", 555, {3: 290, 4: 265}), ("species", 404, None)):
        table = read_table(tmp_path / "p", label, validation=0.1)
        assert len(class_names(table)) == count
        found = read_taxonomy(tmp_path / "p", table)
        assert found.ancestors.shape == (count, 4) and (depths is None or Counter(found.depths.tolist()) == depths)
        assert len(set(found.ancestors[:, 0])) == 22  # the groups below the root
        held = table.filter(split="validation")
        assert held.height / table["is_training_img"].sum() == pytest.approx(0.1, abs=0.003)
        both = table.filter("is_training_img").group_by("species_name", "photographer").agg(pl.col("split").n_unique())
        assert both["split"].max() == 1
