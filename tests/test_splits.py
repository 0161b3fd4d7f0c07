"""Which photographs are held out: the same everywhere, fair to each species, photographers on one side."""

import polars as pl
import pytest

from vit_nabirds.data.splits import held_out

SPECIES = {"Blue Jay": 40, "Wren": 25, "Crow": 9, "Owl": 1}


@pytest.fixture
def table():
    """Photographers with one to four photographs of a species each; two plumages of the jay."""
    rows = []
    for species, count in SPECIES.items():
        for i in range(count):
            plumage = " (Adult)" if species == "Blue Jay" and i % 2 else ""
            rows.append((f"{species}/{i}.jpg", species, species + plumage, f"person {i * i % (count // 3 + 1)}"))
    return pl.DataFrame(rows, ["path", "species_name", "subcategory", "photographer"], orient="row")


def test_each_species_gives_its_share_and_photographers_stay_on_one_side(table):
    table = table.with_columns(held_out(table, 0.2))
    counts = dict(table.group_by("species_name").agg(pl.col("held_out").sum()).rows())
    for species, count in SPECIES.items():
        assert abs(counts[species] - 0.2 * count) <= 3, counts
    assert counts["Owl"] == 0 and counts["Blue Jay"] >= 5
    sides = table.group_by("species_name", "photographer").agg(pl.col("held_out").n_unique())
    assert sides["held_out"].max() == 1


def test_it_does_not_depend_on_the_order_of_the_rows_and_little_on_other_rows(table):
    chosen = set(table.filter(held_out(table, 0.2))["path"])
    # Written out, because another Python, machine or release must choose the same.
    assert sorted(chosen) == EXPECTED
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=1)
    assert set(shuffled.filter(held_out(shuffled, 0.2))["path"]) == chosen
    fewer = table.filter(pl.col("species_name") != "Wren")
    assert set(fewer.filter(held_out(fewer, 0.2))["path"]) == {path for path in chosen if not path.startswith("Wren")}


EXPECTED = [
    "Blue Jay/20.jpg",
    "Blue Jay/22.jpg",
    "Blue Jay/34.jpg",
    "Blue Jay/36.jpg",
    "Blue Jay/6.jpg",
    "Blue Jay/8.jpg",
    "Wren/1.jpg",
    "Wren/10.jpg",
    "Wren/17.jpg",
    "Wren/19.jpg",
    "Wren/8.jpg",
]


def test_every_species_and_category_keeps_a_photograph(table):
    table = table.with_columns(held_out(table, 0.95))
    assert table["held_out"].sum() > 40
    for names in ("species_name", "subcategory"):
        assert table.group_by(names).agg((~pl.col("held_out")).sum())["held_out"].min() >= 1


@pytest.mark.parametrize("name", [None, "our club"])
def test_without_photographers_each_photograph_is_alone(table, name):
    table = table.with_columns(photographer=pl.lit(name, pl.String))
    counts = table.with_columns(held_out(table, 0.2)).group_by("species_name").agg(pl.col("held_out").sum())
    assert dict(counts.rows()) == {"Blue Jay": 8, "Wren": 5, "Crow": 2, "Owl": 0}


def test_share_zero_holds_nothing_out(table):
    assert not held_out(table, 0.0).any()
