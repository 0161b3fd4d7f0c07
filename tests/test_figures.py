"""Figures from a confusion matrix, their intervals, and the tree above the classes: values worked out by hand."""

import numpy as np
import polars as pl
import pytest

from vit_nabirds.data import taxonomy
from vit_nabirds.evaluation.figures import figures_of, intervals_of, wilson

TREE = {  # node: (parent, name)
    "0": (None, "Birds"), "1": ("0", "Ducks"), "2": ("0", "Owls"), "11": ("1", "Dabblers"), "12": ("1", "Divers"),
    "20": ("2", "Barn Owl"), "110": ("11", "Mallard"), "111": ("110", "Mallard (Male)"),
    "112": ("110", "Mallard (Female)"), "113": ("11", "Teal (Male)"), "114": ("11", "Teal (Female)"),
    "120": ("12", "Scaup"),
}  # fmt: skip
LEAVES = ("20", "111", "112", "113", "114", "120")


def tree(folder, label):
    """What a prepared folder with one photograph of each leaf says of its classes."""
    rows = [(node, TREE[node][1], TREE[node][1].partition(" (")[0]) for node in LEAVES]
    table = pl.DataFrame(rows, ["node", "category", "species"], orient="row")
    nodes = pl.DataFrame([(node, *TREE[node]) for node in TREE], ["node", "parent", "name"], orient="row")
    for name, text in taxonomy.as_files(nodes).items():
        (folder / name).write_text(text)
    levels = taxonomy.levels_in_words(nodes, table)
    table = table.with_columns(class_name=pl.col(label))
    table = table.with_columns(label=pl.col("class_name").rank("dense").cast(pl.Int32) - 1)
    return taxonomy.read_taxonomy(folder, table), levels


def test_distances_count_edges_and_a_higher_class_agrees_below_itself(tmp_path):
    found, levels = tree(tmp_path, "category")
    owl, female, male, scaup, teal, drake = range(6)  # in the order of their names
    assert levels == "1 classes at depth 2, 3 classes at depth 3, 2 classes at depth 4"
    assert found.levels == 4 and found.depths.tolist() == [2, 4, 4, 3, 3, 3]
    one = np.array([female, female, female, female, owl])
    other = np.array([male, teal, scaup, owl, owl])
    assert found.distance(one, other).tolist() == [2, 3, 5, 6, 0]
    assert found.agrees(one, other).tolist() == [
        [True, True, True, False], [True, True, False, False], [True, False, False, False], [False] * 4, [True] * 4,
    ]  # fmt: skip


def test_a_species_is_the_node_above_its_plumages(tmp_path):
    found, _ = tree(tmp_path, "species")
    owl, mallard, scaup, teal = range(4)
    # The mallard has a node of its own; the teal, whose plumages hang beside it, gets one below their common parent.
    assert found.depths.tolist() == [2, 3, 3, 3]
    assert found.distance(np.array([mallard, mallard, mallard]), np.array([teal, scaup, owl])).tolist() == [2, 4, 5]


def test_figures_are_means_over_photographs_and_over_classes(tmp_path):
    found, _ = tree(tmp_path, "species")
    confusion = np.array([[6, 0, 0, 0], [0, 2, 1, 1], [0, 0, 0, 0], [1, 1, 0, 8]])  # no scaup in the split
    figures = figures_of(confusion, top5=19, loss=10.0, taxonomy=found)
    assert figures == pytest.approx(
        {
            "loss": 0.5,
            "accuracy": 16 / 20,
            "top5_accuracy": 19 / 20,
            "examples": 20,
            "mean_class_accuracy": (1 + 0.5 + 0.8) / 3,
            "accuracy_level1": 19 / 20,
            "accuracy_level2": 18 / 20,
            "mistake_distance": (4 + 2 + 5 + 2) / 4,
        }  # fmt: skip
    )
    assert "accuracy_level1" not in figures_of(confusion, 19, 10.0)


def test_intervals_are_wilsons():
    # Values from Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson(right / n, n) == pytest.approx([low, high], abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx([0.0061, 0.1718], abs=5e-5)
    confusion = np.array([[30, 10], [0, 40]])
    intervals = intervals_of(figures_of(confusion, 80, 1.0), confusion)
    assert intervals.keys() == {"accuracy_interval", "top5_accuracy_interval", "mean_class_accuracy_interval"}
    assert intervals["accuracy_interval"] == intervals["mean_class_accuracy_interval"]  # equally many of each class
    confusion = np.array([[3, 1], [0, 76]])
    figures = figures_of(confusion, 80, 1.0)
    low, high = intervals_of(figures, confusion)["mean_class_accuracy_interval"]
    assert low < figures["mean_class_accuracy"] - 0.1  # only four photographs of one class


@pytest.mark.parametrize("damage", ["1 0\n2 0\n1 0 0\n", "1 2\n2 1\n111 1\n112 1\n113 1\n114 2\n120 2\n20 2\n"])
def test_a_damaged_hierarchy_is_an_error(tmp_path, damage):
    from vit_nabirds.errors import UserError

    tree(tmp_path, "category")
    table = pl.DataFrame({"node": LEAVES, "class_name": LEAVES, "label": range(6)})
    (tmp_path / "hierarchy.txt").write_text(damage)
    with pytest.raises(UserError, match=r"hierarchy.txt does not fit metadata.parquet"):
        taxonomy.read_taxonomy(tmp_path, table)
