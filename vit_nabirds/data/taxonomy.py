"""The tree above the classes, as NABirds' hierarchy.txt has it: how far a mistake is from the truth."""

import collections
import dataclasses
from pathlib import Path

import numpy as np
import polars as pl

from vit_nabirds.data.foreign import read_text
from vit_nabirds.errors import UserError, quoted

DEEPEST = 100  # levels: of living things, taxonomists name some thirty
FILES = ("hierarchy.txt", "classes.txt")  # '<child> <parent>' and '<node> <name>', as in the archive


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """`ancestors`, int32 (classes, levels): at each level below the root the node that a class belongs to. A class that
    is higher up than the deepest level is its own ancestor below itself. `depths`, int32 (classes)."""

    ancestors: np.ndarray
    depths: np.ndarray

    @property
    def levels(self) -> int:
        return self.ancestors.shape[1]

    def agrees(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """For labels (n,) and (n,): boolean (n, levels), whether both have the same ancestor at a level."""
        return self.ancestors[one] == self.ancestors[other]

    def distance(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """For labels (n,) and (n,): edges of the tree between the two, int (n,)."""
        common = np.minimum(self.agrees(one, other).sum(1), np.minimum(self.depths[one], self.depths[other]))
        return self.depths[one] + self.depths[other] - 2 * common


def as_files(tree: pl.DataFrame | None) -> dict[str, str | None]:
    """The text of hierarchy.txt and classes.txt for a tree with node, parent and name; None without one."""
    if tree is None:
        return dict.fromkeys(FILES)
    children = tree.filter(pl.col("parent").is_not_null())
    rows = (children.select("node", "parent").rows(), tree.select("node", "name").rows())
    return {name: "".join(f"{key} {value}\n" for key, value in pairs) for name, pairs in zip(FILES, rows, strict=True)}


def levels_in_words(tree: pl.DataFrame | None, table: pl.DataFrame) -> str:
    """How many of the table's classes are how deep."""
    if tree is None:
        return ""
    parents = dict(tree.filter(pl.col("parent").is_not_null()).select("node", "parent").rows())
    depths = collections.Counter(len(_above(node, parents)) for node in table["node"].unique().drop_nulls())
    return ", ".join(f"{count:,} classes at depth {depth}" for depth, count in sorted(depths.items()))


def read_taxonomy(root: Path, table: pl.DataFrame) -> Taxonomy | None:
    """Of a prepared folder, for the classes of a table from `read_table`; None where the archive had no tree."""
    file, names = (root / name for name in FILES)
    if not file.is_file() or "node" not in table.columns:
        return None
    try:
        parents = dict(line.split() for line in read_text(file).split("\n") if line)
        names = dict(line.split(maxsplit=1) for line in read_text(names).split("\n") if line)
        if unknown := set(table["node"]) - names.keys():
            raise ValueError(f"{unknown.pop()} is not in {FILES[1]}")
        nodes = table.select("label", "class_name", "node").unique().sort("label", "node")
        return _of_paths([_path(rows, parents, names) for _, rows in nodes.group_by("label", maintain_order=True)])
    except (OSError, ValueError) as error:
        raise UserError(f"{file} does not fit metadata.parquet ({quoted(error)}): prepare the folder again.") from None


def _path(rows: pl.DataFrame, parents: dict[str, str], names: dict[str, str]) -> list[str]:
    """The nodes from below the root to a class. One with several leaves, as a species with its plumages, is the lowest
    node above all of them, or a node of its own below that if the name of the lowest is another."""
    paths = [_above(node, parents) for node in rows["node"]]
    if len(paths) == 1:
        return paths[0]
    shortest = min(map(len, paths))
    same = [len({path[level] for path in paths}) == 1 for level in range(shortest)]
    common = paths[0][: same.index(False) if False in same else shortest]
    name = rows["class_name"][0]
    return common if common and names.get(common[-1]) == name else [*common, f"{name} (class)"]


def _above(node: str, parents: dict[str, str]) -> list[str]:
    path = []
    while node in parents:  # the root has no parent
        if len(path) > DEEPEST:
            raise ValueError(f"{node} has more than {DEEPEST} ancestors, or is its own")
        path.append(node)
        node = parents[node]
    return path[::-1]


def _of_paths(paths: list[list[str]]) -> Taxonomy:
    levels = max(map(len, paths))
    filled = [path + path[-1:] * (levels - len(path)) for path in paths]
    nodes = {node: number for number, node in enumerate(sorted({node for path in filled for node in path}))}
    ancestors = np.array([[nodes[node] for node in path] for path in filled], np.int32)
    return Taxonomy(ancestors, np.array([len(path) for path in paths], np.int32))
