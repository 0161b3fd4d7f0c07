"""The text files of an archive become one table: NABirds' oddities, and a clear message for every contradiction."""

import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from vit_nabirds.data.archive import read_archive, species_of, with_species_ids
from vit_nabirds.errors import UserError

FILES = {
    "images.txt": ["u-1 0617/u1.jpg", "u-2 0318/u2.JPG", "u-3 0358/u3.jpg", "u-4 0955/u4.jpg", "u-5 0348/u5.jpg"],
    "image_class_labels.txt": ["u-5 348", "u-4 955", "u-3 358", "u-2 318", "u-1 617"],
    "bounding_boxes.txt": ["u-1 10 20 30 40", "u-2 -5 -6 50 60", "u-3 90 10 30 300", "u-4 0 0 100 80", "u-5 1 1 1 1"],
    "sizes.txt": ["u-1 100 80", "u-2 100 80", "u-3 100 80", "u-4 100 80", "u-5 100 80"],
    "photographers.txt": [
        "u-1 Ruth Cantwell",
        'u-2 "Mike" Michael L. Baird, flickr.bairdphotos.com',
        "u-3 Christopher L. Wood, Chris Wood",
        "u-4 D'Arcy  O'Neil",
        "u-5 12345",
    ],
    "train_test_split.txt": ["u-1 1", "u-2 0", "u-3 1", "u-4 0", "u-5 1"],
    "classes.txt": [
        "0 Birds",
        "1 Ducks, Geese, and Swans",
        "318 Blue-winged Teal  (Male)",
        "617 Blue-winged Teal  (Female/juvenile)",
        "348 Northern Gannet (Adult, Subadult)",
        "358 Sharp-shinned Hawk (Adult )",
        "955 Clark's Nutcracker",
    ],
    "hierarchy.txt": ["1 0", "318 1", "617 1", "348 1", "358 1", "955 1"],
}


def write(folder: Path, newline: str = "\n", **changed: list[str] | None) -> Path:
    """Write FILES; `images=[...]` replaces the rows of images.txt, None leaves the file out."""
    folder.mkdir(exist_ok=True)
    for name, rows in (FILES | {f"{name}.txt": rows for name, rows in changed.items()}).items():
        if rows is not None:
            (folder / name).write_bytes("".join(row + newline for row in rows).encode())
    return folder


def test_table_has_a_row_per_photograph_in_the_order_of_images_txt(tmp_path):
    table, _ = read_archive(write(tmp_path))
    assert table.columns == [
        "UUID", "bb_x", "bb_y", "bb_width", "bb_height", "class_id", "subcategory", "path", "photographer",
        "width", "height", "is_training_img", "species_name", "species_id",
    ]  # fmt: skip
    assert table["UUID"].to_list() == ["u-1", "u-2", "u-3", "u-4", "u-5"]
    assert table["path"][1] == "0318/u2.JPG"
    assert table["class_id"].to_list() == [617, 318, 358, 955, 348]
    assert table["is_training_img"].to_list() == [True, False, True, False, True]
    assert table["photographer"].to_list() == [row.split(" ", 1)[1] for row in FILES["photographers.txt"]]
    assert table["subcategory"].to_list() == [
        "Blue-winged Teal (Female/juvenile)",
        "Blue-winged Teal (Male)",
        "Sharp-shinned Hawk (Adult )",
        "Clark's Nutcracker",
        "Northern Gannet (Adult, Subadult)",
    ]


def test_plumages_are_one_species_and_ids_follow_the_names_from_zero(tmp_path):
    table, _ = read_archive(write(tmp_path))
    assert table["species_name"].to_list() == [
        "Blue-winged Teal",
        "Blue-winged Teal",
        "Sharp-shinned Hawk",
        "Clark's Nutcracker",
        "Northern Gannet",
    ]
    assert table["species_id"].to_list() == [0, 0, 3, 1, 2]
    assert table["species_id"].dtype == pl.Int32


def test_boxes_are_clamped_to_their_image_and_counted(tmp_path):
    table, notes = read_archive(write(tmp_path))
    boxes = table.select("bb_x", "bb_y", "bb_width", "bb_height").rows()
    assert boxes == [(10, 20, 30, 40), (0, 0, 45, 54), (90, 10, 10, 70), (0, 0, 100, 80), (1, 1, 1, 1)]
    # The hawk is in the train split only, the nutcracker in the test split only.
    assert notes == {"boxes stuck out of their image and were clamped": 2, "species have no train photograph": 1}


def test_crlf_blank_lines_and_a_byte_order_mark_change_nothing(tmp_path):
    plain, _ = read_archive(write(tmp_path / "plain"))
    rows = FILES["sizes.txt"]
    other = write(tmp_path / "other", "\r\n", sizes=["\ufeff" + rows[0], *rows[1:], "", "  "])
    assert read_archive(other)[0].equals(plain)


def test_labels_of_the_course_notebook_are_replaced():
    course = pl.DataFrame(
        {"species_name": ["Green-winged Teal ", "Mallard", "Green-winged Teal"], "species_id": [2, 3, 1]},
        schema_overrides={"species_id": pl.UInt64},
    )
    table = with_species_ids(course)
    assert table["species_name"].to_list() == ["Green-winged Teal", "Mallard", "Green-winged Teal"]
    assert table["species_id"].to_list() == [0, 1, 0]
    assert table["species_id"].dtype == pl.Int32


def test_only_a_trailing_parenthesis_is_plumage():
    names = pl.DataFrame({"name": [" Teal\t (Adult ) ", "Owl (Barn) x", "Crow"]})
    assert names.select(species_of(pl.col("name")))["name"].to_list() == ["Teal", "Owl (Barn) x", "Crow"]


def replaced(name: str, row: int, text: str) -> dict:
    rows = list(FILES[name + ".txt"])
    rows[row - 1] = text
    return {name: rows}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": None}, r"no sizes.txt in it"),
        ({"images": [""]}, r"images.txt: it lists no photograph"),
        (replaced("images", 2, "u-2"), r"images.txt, row 2: 'u-2' is not of the form <UUID> <path>"),
        (replaced("images", 3, "u-1 0/x.jpg"), r"images.txt, row 1: UUID u-1 is in two rows"),
        (replaced("images", 3, "u-3 0617/u1.jpg"), r"images.txt, row 1: path 0617/u1.jpg is in two rows"),
        (replaced("images", 3, "u-3 ../u3.jpg"), r"images.txt, row 3: path ../u3.jpg is not of the form"),
        (replaced("images", 3, "u-3 /etc/u3.jpg"), r"images.txt, row 3: path /etc/u3.jpg is not of the form"),
        (replaced("sizes", 4, "u-4 100"), r"sizes.txt, row 4: 'u-4 100' is not of the form <UUID> <width> <height>"),
        (replaced("sizes", 4, "u-4 100 8O"), r"sizes.txt, row 4: 'u-4 100 8O'"),
        (replaced("sizes", 4, "u-9 100 80"), r"images.txt, row 4: u-4 has no row in sizes.txt"),
        (
            replaced("photographers", 5, "u-5"),
            r"photographers.txt, row 5: 'u-5' is not of the form <UUID> <photographer>",
        ),
        ({"photographers": FILES["photographers.txt"][1:]}, r"row 1: u-1 has no row in photographers.txt"),
        ({"bounding_boxes": FILES["bounding_boxes.txt"][:3]}, r"row 4: u-4 has no row in bounding_boxes.txt.*1 more"),
        (replaced("bounding_boxes", 5, "u-5 1 1 1"), r"bounding_boxes.txt, row 5: 'u-5 1 1 1'"),
        (replaced("bounding_boxes", 5, "u-5 1.5 1 1 1"), r"bounding_boxes.txt, row 5: 'u-5 1.5 1 1 1'"),
        (replaced("bounding_boxes", 5, "u-5 100 1 9 9"), r"bounding_boxes.txt, row 5: the box of u-5 has no area"),
        (replaced("bounding_boxes", 5, "u-5 9 9 9 -1"), r"bounding_boxes.txt, row 5: the box of u-5 has no area"),
        (replaced("image_class_labels", 2, "u-4 999"), r"labels.txt, row 2: class id 999 of u-4 is not in classes"),
        (replaced("classes", 2, "0 Ducks"), r"classes.txt, row 1: class_id 0 is in two rows"),
        (replaced("train_test_split", 2, "u-2 2"), r"train_test_split.txt, row 2: 'u-2 2' is not of the form"),
        ({"train_test_split": [f"u-{n} 1" for n in range(1, 6)]}, r"train_test_split.txt: no test photograph"),
        ({"train_test_split": [f"u-{n} 0" for n in range(1, 6)]}, r"train_test_split.txt: no train photograph"),
    ],
)
def test_errors_name_the_file_and_the_row(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        read_archive(write(tmp_path, **changed))


def test_deleting_a_row_of_images_txt_leaves_a_photograph_out(tmp_path):
    table, _ = read_archive(write(tmp_path, images=FILES["images.txt"][1:]))
    assert table["UUID"].to_list() == ["u-2", "u-3", "u-4", "u-5"]
    assert table["species_id"].to_list() == [0, 3, 1, 2]


def test_missing_folders_and_files_that_are_not_utf_8_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_archive(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "photographers.txt").write_bytes(b"u-1 Jos\xe9\n")
    with pytest.raises(UserError, match=r"photographers.txt: not readable as UTF-8"):
        read_archive(tmp_path)


def test_the_real_archive_is_read_as_a_whole(tmp_path):
    shared = Path(os.environ.get("VIT_NABIRDS_SHARED", Path(__file__).parents[2] / "shared"))
    if not (shared / "nabirds_metadata.tar.xz").exists():
        pytest.skip("set VIT_NABIRDS_SHARED to a folder with nabirds_metadata.tar.xz, the archive's text files")
    shutil.unpack_archive(shared / "nabirds_metadata.tar.xz", tmp_path)
    table, notes = read_archive(next(tmp_path.rglob("images.txt")).parent)
    assert (table.height, table["is_training_img"].sum(), table["class_id"].n_unique()) == (48562, 23929, 555)
    assert sorted(table["species_id"].unique()) == list(range(404))
    assert table.null_count().sum_horizontal().item() == 0
    assert notes == {"boxes stuck out of their image and were clamped": 201, "species have no train photograph": 0}
