"""JSON in COCO's and iNaturalist's form: a row for each annotation that can be used, and a count of the others."""

import json
import re
from pathlib import Path

import polars as pl
import pytest

from vit_nabirds.data.archives import Archive, read_archive
from vit_nabirds.errors import UserError

WHOLE = "photographs have no box and are used whole"
RANKS = {"kingdom": "Animalia", "phylum": "Chordata", "class": "Aves", "order": "Passeriformes", "family": "Paridae"}


def image(identity: object, name: str, **more: object) -> dict:
    return {"id": identity, "file_name": name, "license": 1, "date": "2019-05-01"} | more


def bird(image_id: object, category_id: object, bbox: object = None, **more: object) -> dict:
    found = {
        "id": 900,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": {"size": [1, 2], "counts": "x"},
    }
    return found | ({"bbox": bbox} if bbox is not None else {}) | more


def inaturalist(split: str) -> dict:
    return {
        "info": {"year": 2021},
        "images": [
            image(1, f"{split}/00_Tit/a.jpg", width=500, height=375, rights_holder="Ada"),
            image(2, f"{split}/01_Jay/b.jpg", width=0, height=0, rights_holder=""),
        ],
        "annotations": [bird(2, 1), bird(1, 0)],
        "categories": [
            {"id": 0, "name": "Parus  major", "common_name": "Great Tit", "genus": "Parus", **RANKS},
            {"id": 1, "name": "Garrulus glandarius", "genus": "Garrulus", **RANKS, "family": "Corvidae"},
        ],
    }


def write(folder: Path, data: object, name: str = "train.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data))
    return folder / name


def both(folder: Path) -> Path:
    for split in ("train", "val"):
        write(folder, inaturalist(split), f"{split}.json")
    return folder


def rows(archive: Archive, *more: str) -> list[tuple]:
    return archive.table.select("source", "subcategory", "is_training_img", *more).rows()


def test_train_and_val_files_in_the_order_of_their_annotations(tmp_path):
    write(both(tmp_path), {"images": [image(1, "t.jpg")], "info": {}}, "public_test.json")  # has no labels
    archive = read_archive(tmp_path)
    assert (archive.kind, archive.folder) == ("COCO", tmp_path)
    assert rows(archive, "photographer", "width") == [
        ("train/01_Jay/b.jpg", "Garrulus glandarius", True, None, None),
        ("train/00_Tit/a.jpg", "Parus major", True, "Ada", 500),
        ("val/01_Jay/b.jpg", "Garrulus glandarius", False, None, None),
        ("val/00_Tit/a.jpg", "Parus major", False, "Ada", 500),
    ]
    assert archive.notes == {WHOLE: 4, "photographs of val are the test split: there is no other": 2}


def test_ranks_are_a_tree_and_the_same_node_in_both_files(tmp_path):
    archive = read_archive(both(tmp_path))
    tree = {node: (parent, name) for node, parent, name in archive.taxonomy.rows()}
    assert len(tree) == archive.taxonomy.height == 1 + 4 + 2 + 2 + 2
    nodes = archive.table["node"].to_list()
    assert nodes[:2] == nodes[2:] and len(set(nodes)) == 2
    ways = []
    for node in nodes[:2]:
        ways.append([])
        while node is not None:
            node, name = tree[node]
            ways[-1].append(name)
    assert ways[1] == ["Parus major", "Parus", "Paridae", "Passeriformes", "Aves", "Chordata", "Animalia", "all"]
    assert ways[0][2] == "Corvidae" and ways[0][3:] == ways[1][3:]


def coco(**changed: object) -> dict:
    data = {
        "images": [image(n, f"{n}.jpg", width=100, height=80) for n in range(1, 6)],
        "annotations": [
            bird(1, 7, [10, 20, 30.5, 40]),
            bird(1, 8, [-5, 0, 20, 20]),
            bird(2, 7, [0, 0, 50, 50]),
            bird(2, 7, [50, 0, 50, 50]),
            bird(2, 7, [50, 0, 50, 50]),
            bird(3, 8, [0, 0, 100, 80], iscrowd=1),
            bird(4, 8, []),
        ],
        "categories": [
            {"id": 7, "name": "tit", "supercategory": "bird"},
            {"id": 8, "name": "jay", "supercategory": "bird"},
            {"id": 9, "name": "other", "supercategory": "none"},
        ],
    }
    return data | changed


def test_each_box_is_an_example_and_everything_else_is_counted(tmp_path):
    archive = read_archive(write(tmp_path, coco()), test_share=0.4)
    assert archive.table.select("path", "source", "subcategory", "bb_x", "bb_y", "bb_width", "bb_height").rows() == [
        ("1.jpg", "1.jpg", "tit", 10, 20, 30.5, 40),
        ("1_2.jpg", "1.jpg", "jay", 0, 0, 15, 20),
        ("2.jpg", "2.jpg", "tit", 0, 0, 50, 50),
        ("2_2.jpg", "2.jpg", "tit", 50, 0, 50, 50),
        ("4.jpg", "4.jpg", "jay", None, None, None, None),
    ]
    assert archive.notes == {
        WHOLE: 1,
        "annotations of crowds were left out": 1,
        "boxes stuck out of their image and were clamped": 1,
        "further rows of a photograph or box that is used once": 1,
        "photographs have no annotation and were left out": 1,
    }
    assert archive.taxonomy.sort("node").rows() == [
        ("/", None, "all"), ("/bird", "/", "bird"), ("/bird/jay", "/bird", "jay"), ("/bird/tit", "/bird", "tit"),
        ("/other", "/", "other"),
    ]  # fmt: skip


def test_whole_photographs_have_one_class(tmp_path):
    data = coco(images=[image(n, f"{n}.jpg") for n in range(1, 6)])
    data["annotations"] += [bird(5, 7, [1, 1, 1, 1])]
    archive = read_archive(write(tmp_path, data), crop="none", test_share=0.5)
    assert [row[:2] for row in rows(archive)] == [("2.jpg", "tit"), ("4.jpg", "jay"), ("5.jpg", "tit")]
    assert archive.notes["photographs or boxes are of several classes and were left out"] == 1
    assert archive.notes["further rows of a photograph or box that is used once"] == 2
    assert archive.table["bb_x"].null_count() == 3


def test_boxes_of_one_photograph_and_class_stay_in_one_split(tmp_path):
    images = [image(n, f"{n}.jpg") for n in range(20)]
    birds = [bird(n, n % 2, [1 + side, 1, 9, 9]) for n in range(20) for side in range(3)]
    categories = [{"id": 0, "name": "tit"}, {"id": 1, "name": "jay"}]
    archive = read_archive(
        write(tmp_path, coco(images=images, annotations=birds, categories=categories)), test_share=0.3
    )
    assert archive.taxonomy is None and archive.table["node"].null_count() == 60
    sides = archive.table.group_by("source").agg(pl.col("is_training_img").n_unique())
    assert sides["is_training_img"].to_list() == [1] * 20


def test_pictures_are_found_in_the_folder_of_their_split(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "annotations", coco(), f"instances_{split}2017.json")
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / f"{split}2017/1.jpg").write_bytes(b"-")
    archive = read_archive(tmp_path)
    assert archive.table["source"].to_list()[::5] == ["train2017/1.jpg", "val2017/1.jpg"]
    assert archive.table["path"].to_list()[:2] == ["train2017/1.jpg", "train2017/1_2.jpg"]


def test_each_split_may_have_its_file_beside_its_pictures(tmp_path):
    for split in ("train", "valid", "test"):
        file = write(tmp_path / split, coco(), "_annotations.coco.json")
        (file.parent / "1.jpg").write_bytes(b"-")
    archive = read_archive(tmp_path)
    assert archive.table["source"].to_list()[::5] == ["test/1.jpg", "train/1.jpg"]
    assert archive.notes["photographs of val were left out: data.validation holds some of train out instead"] == 6


def with_annotation(**more: object) -> dict:
    return coco(annotations=[bird(1, 7), bird(2, 8) | more])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (coco(), ": no test photograph. Name a folder with a JSON file for each split, with train and test (or val)"),
        ({"images": [], "annotations": []}, ": no images in it, or not objects in a list. It needs images, annotation"),
        ([1], ": no images in it, or not objects in a list."),
        (coco(annotations=None), ": no annotations in it, or not objects in a list."),
        (coco(categories=["tit"]), ": no categories in it, or not objects in a list."),
        (with_annotation(image_id=77), ", annotations[1]: no image has the id 77. Correct it."),
        (with_annotation(category_id=77), ", annotations[1]: no category has the id 77. Correct it."),
        (with_annotation(category_id=None), ", annotations[1]: no category_id in it. Add it."),
        (with_annotation(bbox=[1, 2, 3]), ", annotations[1]: bbox [1.0, 2.0, 3.0] is not [left, top, width, height]."),
        (with_annotation(bbox=[1, 2, 3, "x"]), ", annotations[1]: bbox is not [left, top, width, height]. Correct it."),
        (with_annotation(bbox="1 2 3 4"), ", annotations[1]: bbox is not [left, top, width, height]. Correct it."),
        (with_annotation(bbox=[1, 2, 0, 9]), ", annotations[1]: the box of 2.jpg has no area in its 100x80 image. Cor"),
        (with_annotation(bbox=[200, 2, 9, 9]), ", annotations[1]: the box of 2.jpg has no area in its 100x80 image."),
        (with_annotation(bbox=[1, 2, float("nan"), 9]), ", annotations[1]: the box of 2.jpg is not four numbers (1.0,"),
        (with_annotation(bbox=[0.1, 0.2, 0.3, 0.4]), ", annotations[1]: the boxes look like shares of the photograph"),
        (with_annotation(iscrowd=1) | {"annotations": [bird(1, 7, iscrowd=1)]}, ": no photograph is left to use (4 p"),
        (coco(images=[image(1, "a"), image(1, "b")]), ", images[0]: id 1 is in two rows. Correct one. (1 more like it"),
        (coco(images=[image(1, "../a.jpg")]), ", images[0]: path ../a.jpg is not of the form <folder>/<file> below"),
        (coco(images=[image(1, " ")]), ", images[0]: the path is empty. Fill it in or delete the row."),
        (coco(images=[image(1, "a\ud800.jpg")]), ": file_name 'a\\ud800.jpg' of images is not Unicode text. Write i"),
        (coco(images=[image(1, ["a.jpg"])]), ", images[0]: file_name is not text or a number. Correct it."),
        (coco(images=[{"id": 1}]), ", images[0]: no file_name in it. Add it."),
        (coco(categories=[{"id": 7, "name": "\u200b"}, {"id": 8, "name": "b"}]), ", annotations[0]: the class of 1.jp"),
    ],
)  # fmt: skip
def test_mistakes_have_one_message(tmp_path, data, message):
    file = write(tmp_path, data, "labels.json")
    with pytest.raises(UserError, match="^" + re.escape(str(file) + message)) as error:
        read_archive(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b'{"images": [', b"[" * 99999, b'{"images": "\xe9"}'])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "labels.json").write_bytes(text)
    with pytest.raises(UserError, match="labels.json: not readable as JSON"):
        read_archive(tmp_path / "labels.json")


def test_a_photograph_in_train_and_in_test_is_refused(tmp_path):
    write(tmp_path, coco(), "train.json")
    write(tmp_path, coco(), "test.json")
    with pytest.raises(UserError, match=r"test.json, annotations\[0\]: 1.jpg is in the train and in the test split"):
        read_archive(tmp_path)


def test_slashes_and_spaces_in_names_are_no_levels_of_the_tree(tmp_path):
    names = [("a/b", "x"), ("b", "x/a"), ("b c", "x"), ("b_c", "x"), ("%20", "x"), ("\u200b", "x")]
    categories = [{"id": 7 + n, "name": name, "supercategory": above} for n, (name, above) in enumerate(names)]
    archive = read_archive(write(tmp_path, coco(categories=categories)), test_share=0.4)
    assert sorted(archive.taxonomy["name"]) == ["%20", "a/b", "all", "b", "b c", "b_c", "x", "x/a"]
    assert archive.table["node"].n_unique() == 2
    assert not archive.taxonomy["node"].str.contains(r"\s").any()


def test_two_files_of_one_split_are_refused(tmp_path):
    write(both(tmp_path), inaturalist("train_mini"), "train_mini.json")
    with pytest.raises(
        UserError, match="train.json, train_mini.json, val.json could all hold the labels. Name one, or"
    ):
        read_archive(tmp_path)
    (tmp_path / "train_mini.json").unlink()
    (tmp_path / "test.csv").write_text("path,label\na.jpg,tit\n")
    with pytest.raises(UserError, match="test.csv, train.json, val.json could all hold the labels"):
        read_archive(tmp_path)
