"""The text files of NABirds and CUB-200-2011 become one table, and every contradiction in them has a clear message."""

import shutil
import unicodedata
from pathlib import Path

import polars as pl
import pytest
from conftest import SHARED

from vit_nabirds.data.archives import read_archive
from vit_nabirds.data.archives.names import clean_name, species_of
from vit_nabirds.errors import ConfigError, UserError

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
    archive = read_archive(write(tmp_path))
    table = archive.table
    assert (archive.kind, archive.folder) == ("NABirds", tmp_path / "images")
    assert table.columns == [
        "path", "source", "subcategory", "species_name", "node", "photographer", "is_training_img", "bb_x", "bb_y",
        "bb_width", "bb_height", "width", "height", "UUID", "class_id",
    ]  # fmt: skip
    assert table["UUID"].to_list() == ["u-1", "u-2", "u-3", "u-4", "u-5"]
    assert table["path"][1] == table["source"][1] == "0318/u2.JPG"
    assert table["class_id"].to_list() == [617, 318, 358, 955, 348]
    assert table["is_training_img"].to_list() == [True, False, True, False, True]
    assert table["photographer"].to_list() == [
        "Ruth Cantwell",
        '"Mike" Michael L. Baird, flickr.bairdphotos.com',
        "Christopher L. Wood, Chris Wood",
        "D'Arcy O'Neil",
        "12345",
    ]
    assert table["subcategory"].to_list() == [
        "Blue-winged Teal (Female/juvenile)",
        "Blue-winged Teal (Male)",
        "Sharp-shinned Hawk (Adult )",
        "Clark's Nutcracker",
        "Northern Gannet (Adult, Subadult)",
    ]


def test_plumages_are_one_species(tmp_path):
    assert read_archive(write(tmp_path)).table["species_name"].to_list() == [
        "Blue-winged Teal",
        "Blue-winged Teal",
        "Sharp-shinned Hawk",
        "Clark's Nutcracker",
        "Northern Gannet",
    ]


def boxes(table: pl.DataFrame) -> list[tuple]:
    return table.select("bb_x", "bb_y", "bb_width", "bb_height").rows()


def test_boxes_are_clamped_to_their_image_and_counted(tmp_path):
    archive = read_archive(write(tmp_path))
    assert boxes(archive.table) == [
        (10, 20, 30, 40), (0, 0, 45, 54), (90, 10, 10, 70), (0, 0, 100, 80), (1, 1, 1, 1)
    ]  # fmt: skip
    # The hawk is in the train split only, the nutcracker in the test split only.
    assert archive.notes == {
        "boxes stuck out of their image and were clamped": 2,
        "species have no train photograph": 1,
    }


def test_whole_photographs_have_no_boxes(tmp_path):
    archive = read_archive(write(tmp_path, bounding_boxes=[f"u-{n} 900 1 1 0" for n in range(1, 6)]), crop="none")
    assert boxes(archive.table) == [(None,) * 4] * 5
    assert archive.notes == {"species have no train photograph": 1}
    assert archive.table["width"].to_list() == [100] * 5


def test_crlf_blank_lines_and_a_byte_order_mark_change_nothing(tmp_path):
    plain = read_archive(write(tmp_path / "plain"))
    rows = FILES["sizes.txt"]
    other = write(tmp_path / "other", "\r\n", sizes=["\ufeff" + rows[0], *rows[1:], "", "  "])
    assert read_archive(other).table.equals(plain.table)


def test_an_archive_may_be_in_a_folder_of_its_own(tmp_path):
    write(tmp_path / "nabirds")
    (tmp_path / "photographs of other people").mkdir()
    (tmp_path / "README.txt").write_text("unpacked")
    assert read_archive(tmp_path).folder == tmp_path / "nabirds/images"


def test_names_that_differ_in_form_or_white_space_are_one_class(tmp_path):
    rows = FILES["classes.txt"]
    classes = [*rows[:2], "318 Rüppell's\u00a0 Teal (Male)", "617 Ru\u0308ppell's Teal\u200b (Male) ", *rows[4:]]
    archive = read_archive(write(tmp_path, classes=classes))
    assert archive.table["subcategory"][:2].to_list() == ["Rüppell's Teal (Male)"] * 2
    assert archive.table["node"][:2].to_list() == ["617"] * 2  # the first one's
    assert archive.notes["class names differ from another only in form or white space and were taken for it"] == 1


def clean(*names: str) -> list[str]:
    return pl.DataFrame({"name": names}).select(clean_name(pl.col("name")))["name"].to_list()


def test_clean_names_are_composed_and_have_single_spaces():
    raw = ["A\t\u2003b\r\nc", "\u3000x \u200b y\ufeff", "e\u200d\u0301", "n\x00o\x1fte\u00ad", "\u3164 \u2060", "Ähm"]
    assert clean(*raw) == ["A b c", "x y", "é", "note", "", "Ähm"]


def test_a_clean_name_stays_as_it_is():
    every = [chr(code) for code in range(0x32000) if not 0xD800 <= code < 0xE000] + list("\U000e0001\U000e0100")
    texts = [f"a{one}{other}\u0301 {one}b" for one, other in zip(every, every[7:] + every[:7], strict=True)]
    once = clean(*texts)
    assert clean(*once) == once
    # Characters that are newer than this Python's tables are unassigned in them.
    known = [text for text in once if not any(unicodedata.category(character) == "Cn" for character in text)]
    assert [text for text in known if unicodedata.normalize("NFC", text) != text] == []
    assert not any("  " in text or text != text.strip() or "\u200b" in text for text in once)


def test_only_a_trailing_parenthesis_is_plumage():
    names = pl.DataFrame({"name": [" Teal\t (Adult )\u00a0", "Owl (Barn) x", "Crow", "Jay(Blue)"]})
    assert names.select(species_of(pl.col("name")))["name"].to_list() == ["Teal", "Owl (Barn) x", "Crow", "Jay"]


def test_the_tree_of_classes_is_kept(tmp_path):
    archive = read_archive(write(tmp_path))
    assert archive.table["node"].to_list() == ["617", "318", "358", "955", "348"]
    tree = {node: (parent, name) for node, parent, name in archive.taxonomy.rows()}
    assert archive.taxonomy.columns == ["node", "parent", "name"]
    assert tree["0"] == (None, "Birds") and tree["1"] == ("0", "Ducks, Geese, and Swans")
    assert tree["318"] == ("1", "Blue-winged Teal (Male)") and len(tree) == 7
    without = read_archive(write(tmp_path / "other", hierarchy=None))
    assert without.taxonomy is None and without.table["node"].null_count() == 5


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
        (
            replaced("classes", 3, "318 \u200b") | {"hierarchy": None},
            r"classes.txt, row 3: the class of 0318/u2.JPG has no name",
        ),
        (replaced("classes", 2, "1 \u200b"), r"classes.txt, row 2: class id 1 has no name. Give one."),
        (replaced("classes", 3, "318 (Male)"), r"classes.txt, row 3: the class of 0318/u2.JPG has no name"),
        (replaced("hierarchy", 1, "1 955"), r"hierarchy.txt, row 1: class id 1 does not descend from a root.*5 more"),
        (replaced("hierarchy", 2, "318 318"), r"hierarchy.txt, row 2: class id 318 does not descend from a root"),
        (replaced("hierarchy", 2, "318 7"), r"hierarchy.txt, row 2: class id 7 is not in classes.txt"),
        (replaced("hierarchy", 2, "77 1"), r"hierarchy.txt, row 2: class id 77 is not in classes.txt"),
        (replaced("hierarchy", 2, "617 0"), r"hierarchy.txt, row 2: class_id 617 is in two rows"),
        (replaced("hierarchy", 2, ""), r"class_labels.txt, row 4: class id 318 of u-2 is not in hierarchy.txt"),
        ({"hierarchy": ["318 0", *FILES["hierarchy.txt"][2:]]}, r"hierarchy.txt: .* and here are 2 \(0, 1\)"),
        ({"hierarchy": []}, r"hierarchy.txt: .* and here are 0 \(none\)"),
        (replaced("images", 3, "u-3 0/"), r"images.txt, row 3: path 0/ is not of the form"),
        (replaced("train_test_split", 2, "u-2 2"), r"train_test_split.txt, row 2: 'u-2 2' is not of the form"),
        ({"train_test_split": [f"u-{n} 1" for n in range(1, 6)]}, r"train_test_split.txt: no test photograph"),
        ({"train_test_split": [f"u-{n} 0" for n in range(1, 6)]}, r"train_test_split.txt: no train photograph"),
    ],
)
def test_errors_name_the_file_and_the_row(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        read_archive(write(tmp_path, **changed))


def test_deleting_a_row_of_images_txt_leaves_a_photograph_out(tmp_path):
    table = read_archive(write(tmp_path, images=FILES["images.txt"][1:])).table
    assert table["UUID"].to_list() == ["u-2", "u-3", "u-4", "u-5"]


def test_missing_folders_and_files_that_are_not_utf_8_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_archive(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "photographers.txt").write_bytes(b"u-1 Jos\xe9\n")
    with pytest.raises(UserError, match=r"photographers.txt: not readable as UTF-8"):
        read_archive(tmp_path)


def test_a_share_is_held_out_only_without_a_test_split(tmp_path):
    all_train, one_class = [f"u-{n} 1" for n in range(1, 6)], [f"u-{n} 348" for n in range(1, 6)]
    train = write(tmp_path / "train", train_test_split=all_train, image_class_labels=one_class)
    assert read_archive(train, test_share=0.4).table["is_training_img"].sum() == 3
    with pytest.raises(UserError, match="--test_share=0.4 of 5 photographs leaves none to test on"):
        read_archive(write(tmp_path / "lone", train_test_split=all_train), test_share=0.4)  # each class trains
    with pytest.raises(UserError, match="train_test_split.txt: the archive has a test split of 2 photographs"):
        read_archive(write(tmp_path / "both"), test_share=0.5)


@pytest.mark.parametrize(
    "options", [{"crop": "boxes"}, {"test_share": 0}, {"test_share": 1.0}, {"test_share": float("nan")}]
)
def test_wrong_options_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        read_archive(write(tmp_path), **options)


CUB = {
    "images.txt": [
        "1 002.Parakeet_Auklet/P_1.jpg",
        "2 004.Groove-billed_Ani/G_2.jpg",
        "10 002.Parakeet_Auklet/P_10.jpg",
    ],
    "image_class_labels.txt": ["1 2", "2 4", "10 2"],
    "bounding_boxes.txt": ["1 60.0 27.5 325.0 304.0", "2 -3.5 2.0 9.0 8.0", "10 1.0 1.0 1.5 1.0"],
    "train_test_split.txt": ["1 0", "2 1", "10 1"],
    "classes.txt": ["2 002.Parakeet_Auklet", "4 004.Groove-billed_Ani"],
}


def write_cub(folder: Path, **changed: list[str]) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (CUB | {f"{name}.txt": rows for name, rows in changed.items()}).items():
        (folder / name).write_text("".join(f"{row}\n" for row in rows))
    return folder


def test_cub_has_fractional_boxes_numbers_in_names_and_no_photographers(tmp_path):
    folder = write_cub(tmp_path / "CUB_200_2011")
    (tmp_path / "attributes.txt").write_text("1 has_bill_shape::curved\n")
    (tmp_path / "segmentations").mkdir()
    archive = read_archive(tmp_path)
    table = archive.table
    assert (archive.kind, archive.folder, archive.taxonomy) == ("CUB-200-2011", folder / "images", None)
    assert table["source"].to_list() == [row.split()[1] for row in CUB["images.txt"]]
    names = ["Parakeet Auklet", "Groove-billed Ani", "Parakeet Auklet"]
    assert table["subcategory"].to_list() == table["species_name"].to_list() == names
    assert boxes(table) == [(60, 27.5, 325, 304), (0, 2, 5.5, 8), (1, 1, 1.5, 1)]
    assert table["is_training_img"].to_list() == [False, True, True]
    assert table.select("width", "height", "photographer", "node").null_count().row(0) == (3, 3, 3, 3)
    assert archive.notes == {"boxes stuck out of their image and were clamped": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bounding_boxes": ["1 6.0 7.5 x 3.0"]}, r"boxes.txt, row 1: '1 6.0 7.5 x 3.0' is not of .*\(pixels\)"),
        ({"bounding_boxes": ["1 1. 1. 2. 0.0", *CUB["bounding_boxes.txt"][1:]]}, r"row 1: the box of 1 has no area in"),
        ({"classes": ["2 002.", "4 004.Ani"]}, r"classes.txt, row 1: the class of 002.Parakeet_Auklet/P_1.jpg has no"),
        ({"train_test_split": ["1 1", "2 1", "10 1"]}, r"train_test_split.txt: no test photograph.*--test_share=0.2"),
    ],
)
def test_errors_in_cub_name_the_file_and_the_row(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        read_archive(write_cub(tmp_path / "cub", **changed))


def test_the_real_archive_is_read_as_a_whole(tmp_path):
    if not (SHARED / "nabirds_metadata.tar.xz").exists():
        pytest.skip("set VIT_NABIRDS_SHARED to a folder with nabirds_metadata.tar.xz, the archive's text files")
    shutil.unpack_archive(SHARED / "nabirds_metadata.tar.xz", tmp_path)
    archive = read_archive(next(tmp_path.rglob("images.txt")).parent)
    table = archive.table
    assert (table.height, table["is_training_img"].sum(), table["class_id"].n_unique()) == (48562, 23929, 555)
    assert (table["subcategory"].n_unique(), table["species_name"].n_unique(), table["node"].n_unique()) == (
        555,
        404,
        555,
    )
    assert table.null_count().sum_horizontal().item() == 0
    assert archive.notes == {"boxes stuck out of their image and were clamped": 201}
    parents = dict(archive.taxonomy.select("node", "parent").iter_rows())
    assert [node for node, parent in parents.items() if parent is None] == ["0"]
    depths = []
    for node in table["node"].unique():
        depths.append(0)
        while node := parents[node]:
            depths[-1] += 1
    assert (depths.count(3), depths.count(4), len(depths)) == (290, 265, 555)
