"""The drawn archive: NABirds' layout, reproducible, birds where the boxes say."""

import random

import numpy as np
import pytest
from PIL import Image

from vit_nabirds.data.archives import read_archive
from vit_nabirds.data.synthetic import PLUMAGES, draw_archive, draw_bird
from vit_nabirds.errors import UserError


def test_the_layout_is_that_of_the_real_archive(tmp_path):
    draw_archive(tmp_path, species=4, train=6, test=4, size=(90, 120))
    table = read_archive(tmp_path).table
    assert table.height == 4 * 10
    assert table["species_name"].n_unique() == 4 and table["class_id"].n_unique() == 6  # two show two plumages
    assert set(table.group_by("species_name", "is_training_img").len().select("is_training_img", "len").rows()) == {
        (True, 6),
        (False, 4),
    }
    ids = sorted(table["class_id"].unique())
    assert ids != list(range(ids[0], ids[0] + len(ids)))
    assert table["photographer"].n_unique() > 10
    for row in table.iter_rows(named=True):
        assert row["path"] == f"{row['class_id']:04d}/{row['UUID'].replace('-', '')}.jpg"
        with Image.open(tmp_path / "images" / row["path"]) as image:
            assert image.size == (row["width"], row["height"]) and image.format == "JPEG"
        assert min(image.size) >= 90 and max(image.size) <= 120


def test_the_seed_determines_every_byte(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_archive(tmp_path / name, species=2, train=2, test=1, seed=seed)
    a, b, c = (
        {str(file.relative_to(tmp_path / name)): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    )
    assert a == b
    assert a.keys() != c.keys()


@pytest.mark.parametrize("plumage", PLUMAGES, ids=lambda plumage: plumage.name)
def test_the_bird_is_where_its_box_says(plumage):
    """Drawn in its colours and in bright green with the same seed, the images differ inside the box only."""
    marker = plumage._replace(colours=" ".join("-" if part == "-" else "0f0" for part in plumage.colours.split()))
    image, box = draw_bird(plumage, 150, 120, random.Random(3))
    other, other_box = draw_bird(marker, 150, 120, random.Random(3))
    assert box == other_box
    rows, columns = np.nonzero(np.abs(np.asarray(image).astype(int) - np.asarray(other)).max(axis=2) > 20)
    left, top, width, height = box
    assert left <= columns.min() <= left + 3 and left + width - 4 <= columns.max() < left + width
    assert top <= rows.min() <= top + 4 and top + height - 12 <= rows.max() < top + height


def test_mean_colour_does_not_identify_the_species(tmp_path):
    """A single colour per image would make the demo's accuracy meaningless."""
    draw_archive(tmp_path, species=6, train=16, test=8)
    table = read_archive(tmp_path).table
    means = np.array([np.asarray(Image.open(tmp_path / "images" / path)).mean(axis=(0, 1)) for path in table["path"]])
    train, labels = table["is_training_img"].to_numpy(), table["species_name"].to_numpy()
    nearest = np.abs(means[~train, None] - means[None, train]).sum(axis=2).argmin(axis=1)
    assert (labels[train][nearest] == labels[~train]).mean() < 0.6


def test_too_many_species_are_refused(tmp_path):
    with pytest.raises(UserError, match="give 1 to 10 species"):
        draw_archive(tmp_path / "a", species=11)
    assert not (tmp_path / "a").exists()
