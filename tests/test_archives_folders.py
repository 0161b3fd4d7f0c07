"""A folder for each class: every file is an example, counted, or the reason for a message."""

import os
import re
import shutil
from pathlib import Path

import pytest

from vit_nabirds.data.archives import Archive, read_archive
from vit_nabirds.errors import UserError

BOTH = ["train/Teal/a.jpg", "train/Teal/b.png", "train/Wren/c.jpg", "test/Teal/a.jpg", "test/Wren/d.jpg"]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"-")
    return folder


def rows(archive: Archive) -> list[tuple]:
    return archive.table.select("source", "subcategory", "is_training_img").rows()


WHOLE = "photographs have no box and are used whole"


def test_train_and_test_folders(tmp_path):
    archive = read_archive(fill(tmp_path, *BOTH))
    assert (archive.kind, archive.folder, archive.taxonomy) == ("a folder for each class", tmp_path, None)
    assert rows(archive) == [
        ("test/Teal/a.jpg", "Teal", False),
        ("test/Wren/d.jpg", "Wren", False),
        ("train/Teal/a.jpg", "Teal", True),
        ("train/Teal/b.png", "Teal", True),
        ("train/Wren/c.jpg", "Wren", True),
    ]
    table = archive.table
    assert table["path"].equals(table["source"].alias("path"))
    assert table["species_name"].to_list() == table["subcategory"].to_list()
    unknown = ["photographer", "node", "bb_x", "bb_y", "bb_width", "bb_height", "width", "height"]
    assert table.select(unknown).null_count().row(0) == (5,) * 8
    assert archive.notes == {WHOLE: 5}
    assert read_archive(tmp_path, crop="none").notes == {}


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "VALID"), ("train", "validation"), ("train", "dev")])
def test_val_is_the_test_split_where_there_is_no_other(tmp_path, names):
    train, val = names
    archive = read_archive(fill(tmp_path, f"{train}/A/1.jpg", f"{train}/B/2.jpg", f"{val}/A/3.jpg", f"{val}/B/4.jpg"))
    assert {source for source, _, trains in rows(archive) if not trains} == {f"{val}/A/3.jpg", f"{val}/B/4.jpg"}
    assert archive.notes == {WHOLE: 4, "photographs of val are the test split: there is no other": 2}


def test_val_beside_test_is_left_out_and_counted(tmp_path):
    archive = read_archive(fill(tmp_path, *BOTH, "val/Teal/x.jpg", "val/Owl/y.jpg"))
    assert [source for source, *_ in rows(archive)] == sorted(BOTH)
    assert archive.notes["photographs of val were left out: data.validation holds some of train out instead"] == 2


def test_one_level_needs_a_test_share(tmp_path):
    fill(tmp_path, *(f"{name}/{n}.jpg" for name in ("Teal", "Wren") for n in range(10)))
    with pytest.raises(UserError, match=r"no test photograph\. Add a folder test/ .*, or give --test_share=0\.2"):
        read_archive(tmp_path)
    table = read_archive(tmp_path, test_share=0.2).table
    assert table.group_by("subcategory", "is_training_img").len().sort(table.columns[2], "is_training_img").rows() == [
        ("Teal", False, 2), ("Teal", True, 8), ("Wren", False, 2), ("Wren", True, 8)
    ]  # fmt: skip
    assert read_archive(tmp_path, test_share=0.2).table.equals(table)


def test_a_share_of_train_is_held_out_but_not_beside_a_test_split(tmp_path):
    only = fill(tmp_path / "only", *(f"train/{name}/{n}.jpg" for name in "AB" for n in range(4)))
    assert read_archive(only, test_share=0.5).table["is_training_img"].sum() == 4
    for other in ("test", "val"):
        both = fill(tmp_path / other, "train/A/1.jpg", "train/B/1.jpg", f"{other}/A/2.jpg")
        with pytest.raises(UserError, match="the archive has a test split of 1 photographs. Leave --test_share out"):
            read_archive(both, test_share=0.5)


def test_every_other_file_is_counted_but_for_what_systems_leave(tmp_path):
    fill(tmp_path, *BOTH, "train/Teal/.DS_Store", "train/.hidden/x.jpg", "Thumbs.db", "__MACOSX/train/a.jpg")
    fill(
        tmp_path,
        "README.md",
        "train/labels.csv",
        "train/Teal/notes.CSV",
        "train/loose.jpg",
        "extra/deep/x.jpg",
        "x.jpg",
    )
    fill(tmp_path, "train/Teal/male/1/z.JPG", "train/Teal/no suffix", "test/Wren/Mr. Smith's", "train/Wren/cat.pdf")
    (tmp_path / "train/Owl").mkdir()
    os.mkfifo(tmp_path / "train/Teal/pipe.jpg")
    (tmp_path / "train/Teal/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "train/Teal/itself.jpg").symlink_to("itself.jpg")
    archive = read_archive(tmp_path)
    new = {"train/Teal/male/1/z.JPG": "Teal", "train/Teal/no suffix": "Teal", "test/Wren/Mr. Smith's": "Wren"}
    assert [row[:2] for row in rows(archive)] == sorted(
        [(name, name.split("/")[1]) for name in BOTH] + list(new.items())
    )
    assert archive.notes == {
        WHOLE: 8,
        "files end in .md and were left out, as no photographs": 1,
        "files end in .csv and were left out, as no photographs": 2,
        "files end in .pdf and were left out, as no photographs": 1,
        "files lie outside of every class folder and were left out": 3,
        "photographs lie in folders below their class's folder": 1,
        "links that lead nowhere, pipes and the like were left out": 3,
        "class folders hold no photograph": 1,
    }


def test_linked_folders_are_followed_but_not_in_a_circle(tmp_path):
    fill(tmp_path / "elsewhere", "Teal/a.jpg", "Teal/b.jpg")
    data = fill(tmp_path / "data", "train/Wren/c.jpg", "test/Wren/d.jpg")
    for split in ("train", "test"):
        (data / split / "Teal").symlink_to(tmp_path / "elsewhere/Teal")
    (data / "train/Wren/up").symlink_to(data)
    (data / "train/Wren/linked.jpg").symlink_to(tmp_path / "elsewhere/Teal/a.jpg")
    archive = read_archive(data)
    assert [source for source, *_ in rows(archive)] == [
        "test/Teal/a.jpg", "test/Teal/b.jpg", "test/Wren/d.jpg", "train/Teal/a.jpg", "train/Teal/b.jpg",
        "train/Wren/c.jpg", "train/Wren/linked.jpg",
    ]  # fmt: skip
    assert archive.notes["links lead back to a folder above them and were not followed"] == 1


def test_a_class_has_the_folders_name_in_one_form(tmp_path):
    fill(
        tmp_path,
        "train/Rüppell's_Teal/a.jpg",
        "test/Ru\u0308ppell's_Teal/b.jpg",
        "train/Owl  x/c.jpg",
        "test/Owl x/D.jpg",
    )
    fill(tmp_path, "test/Owl x/d.jpg", "test/Owl x/back\\slash.jpg", "test/Owl x/new\nline.jpg")
    archive = read_archive(tmp_path)
    assert sorted(archive.table["subcategory"].unique()) == ["Owl x", "Rüppell's_Teal"]
    assert archive.table["path"].n_unique() == 7
    assert archive.notes["class names differ from another only in form or white space and were taken for it"] == 2


def test_a_class_may_be_called_train(tmp_path):
    archive = read_archive(fill(tmp_path, "train/1.jpg", "train/2.jpg", "bus/1.jpg", "bus/2.jpg"), test_share=0.5)
    assert sorted(archive.table["subcategory"].unique()) == ["bus", "train"]


def test_an_archive_may_be_in_a_folder_of_its_own(tmp_path):
    fill(tmp_path, *(f"birds/{name}" for name in BOTH), "README.md")
    assert read_archive(tmp_path).folder == tmp_path / "birds"
    one_level = fill(tmp_path / "other", *(f"birds/{name}/{n}.jpg" for name in "AB" for n in range(5)))
    assert sorted(read_archive(one_level, test_share=0.2).table["subcategory"].unique()) == ["A", "B"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/A/1.jpg", "train/B/2.jpg"],
            "no test photograph. Add a folder test/ with a folder for each class, or give",
        ),
        (["test/A/1.jpg", "test/B/2.jpg"], "no train photograph. Add a folder train/ with a folder for each class."),
        (
            ["train/A/1.jpg", "test/A/2.jpg"],
            "all 2 photographs are of one class, 'A'. Give photographs of at least two.",
        ),
        (["train/A/1.jpg", "train/B/2.jpg", "test/1.jpg"], "test: 1 files in it, but no class folders"),
        (
            ["train/1.jpg", "test/1.jpg"],
            "test: 1 files in it, but no class folders: a photograph's folder is its class.",
        ),
        (
            ["A/train/1.jpg", "A/test/2.jpg", "B/train/3.jpg"],
            "splits in class folders, as A/test/2.jpg. Make it <split>/",
        ),
        (["train/\u200b/1.jpg", "test/A/2.jpg"], "/train/\\u200b/1.jpg: the class of train/\\u200b/1.jpg has no name"),
        (
            ["a.jpg", "b.jpg"],
            "photographs lie directly in it, and the folder of a photograph is",
        ),
        (
            ["train/A/1.txt", "test/A/2.txt"],
            "no photograph in a folder of its class. Make it <class>/<photograph> or train",
        ),
        (["cleaned_images/A/1.jpg", "prepared.json"], "a folder that `prepare` has written"),
    ],
)
def test_mistakes_have_one_message(tmp_path, names, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_archive(fill(tmp_path, *names))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_class_in_test_only_is_counted(tmp_path):
    archive = read_archive(fill(tmp_path, *BOTH, "test/Owl/e.jpg", "test/Owl/f.jpg"))
    assert archive.notes["species have no train photograph"] == 1


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    fill(tmp_path, *BOTH)
    Path(os.fsdecode(bytes(tmp_path / "train/Teal") + b"/Mal\xe9.jpg")).write_bytes(b"-")
    with pytest.raises(UserError, match=r"1 names in it are not UTF-8, as b'train/Teal/Mal\\xe9.jpg'. Rename them"):
        read_archive(tmp_path)


def test_a_packed_archive_is_to_be_unpacked(tmp_path):
    packed = shutil.make_archive(str(tmp_path / "birds"), "gztar", fill(tmp_path / "in", *BOTH))
    with pytest.raises(UserError, match="birds.tar.gz: a packed file. Unpack it"):
        read_archive(packed)
