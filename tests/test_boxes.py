"""Boxes of birds: the files that state them, whose photograph they are, and in which frame."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_nabirds.data.boxes import BoxFinder, match, read_boxes, to_upright
from vit_nabirds.data.pictures import Picture, open_picture
from vit_nabirds.errors import UserError

GREY, RED = (128, 128, 128), (220, 40, 40)
STORED, UPRIGHT = (60, 40), (40, 60)  # of a photograph of orientation 5 to 8


def photograph(file: Path, orientation: int, red: tuple, size: tuple[int, int] = STORED) -> Picture:
    """A grey picture with a red (left, top, width, height), as stored, that EXIF wants to be turned."""
    image, exif = Image.new("RGB", size, GREY), Image.Exif()
    image.paste(RED, (red[0], red[1], red[0] + red[2], red[1] + red[3]))
    exif[0x0112] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, exif=exif)
    return open_picture(file)


def is_red(picture: Picture, box: tuple) -> bool:
    """Whether the box holds all the red of the upright picture, and nothing else."""
    left, top, width, height = map(round, box)
    red = np.abs(picture.read().astype(int) - RED).max(axis=2) < 50
    return bool(red.sum() == red[top : top + height, left : left + width].sum() == width * height)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_in_the_frame_that_their_sizes_say(tmp_path, orientation):
    stored = (10, 5, 30, 20)
    picture = photograph(tmp_path / "a.png", orientation, stored)
    upright = picture.upright(stored)
    assert is_red(picture, upright)
    swapped, turned = orientation > 4, orientation > 1
    for sizes in (None, (61, 40), *([] if swapped else [STORED])):  # nothing says: as people see it
        lies_in_one = upright[1] + upright[3] > 41 if swapped else False
        assert to_upright(upright, sizes, picture) == (upright, turned and not lies_in_one)
    if swapped:
        assert to_upright(stored, STORED, picture) == (upright, False)
        assert to_upright(upright, UPRIGHT, picture) == (upright, False)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_box_that_lies_in_one_frame_alone_is_of_that_frame(tmp_path, orientation):
    picture = photograph(tmp_path / "a.png", orientation, wide := (2, 5, 56, 20))
    upright = picture.upright(wide)
    for sizes in (None, (61, 40)):
        assert to_upright(wide, sizes, picture) == (upright, False)
        assert to_upright(upright, sizes, picture) == (upright, False)


def test_the_frame_of_a_square_is_left_open(tmp_path):
    picture = photograph(tmp_path / "a.png", 6, (10, 5, 30, 20), size=(60, 60))
    box, left_open = to_upright(picture.upright((10, 5, 30, 20)), (60, 60), picture)
    assert left_open and is_red(picture, box)


@pytest.fixture
def photographs(tmp_path):
    """Two photographs, the second one turned, in a folder images/ with the class's folder below it."""
    root = tmp_path / "images"
    photograph(root / "001.Jay" / "a b.png", 1, (10, 5, 30, 20))
    photograph(root / "001.Jay" / "c.png", 6, (20, 10, 8, 6))
    return sorted(root.rglob("*.png"))


def text_files(folder: Path, sizes: bool) -> Path:
    (folder / "images.txt").write_text("u-1 001.Jay/a b.png \nu-2 001.Jay/c.png\n")
    second = "20 10 8 6" if sizes else "24 20 6 8"  # of the pixels as stored, or of the upright picture
    (folder / "bounding_boxes.txt").write_text(f"u-1 10.0 5.0 30.0 20.0\n\nu-2 {second}\n")
    if sizes:
        (folder / "sizes.txt").write_text("u-1 60 40\nu-2 60 40\n")
    return folder / "bounding_boxes.txt"


def csv_file(folder: Path, header: str, second: str) -> Path:
    (folder / "boxes.csv").write_text(
        f"{header}\r\n001.Jay/a b.png,10,5,30,20,,\r\n001.Jay/c.png,{second}\r\n", "utf-8-sig"
    )
    return folder / "boxes.csv"


def table(folder: Path, separator: str) -> Path:
    rows = ["Image;XMin;YMin;XMax;YMax", '"001.Jay/a b.png";10;5;40;25', "001.Jay/c.png;24;20;30;28"]
    (folder / "corners.csv").write_text("\n".join(rows).replace(";", separator))
    return folder / "corners.csv"


def coco(folder: Path) -> Path:
    images = [
        {"id": 7, "file_name": "001.Jay/a b.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "001.Jay/c.png", "width": 40, "height": 60},
    ]
    boxes = [{"image_id": 3, "bbox": [24, 20, 6, 8]}, {"image_id": 7, "bbox": [10, 5, 30, 20]}, {"image_id": 7}]
    boxes.append({"image_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 1})
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    return folder / "coco.json"


def megadetector(folder: Path, **second) -> Path:
    animal = {"category": "1", "conf": 0.9, "bbox": [10 / 60, 5 / 40, 30 / 60, 20 / 40]}
    person = {"category": "2", "conf": 0.99, "bbox": [0, 0, 1, 1]}
    doubtful = {"category": "1", "conf": 0.19, "bbox": [0, 0, 1, 1]}
    turned = {"category": "1", "conf": 0.2, "bbox": [24 / 40, 20 / 60, 6 / 40, 8 / 60]}
    images = [
        {"file": "001.Jay\\a b.png", "detections": [person, animal, doubtful]},
        {"file": "001.Jay\\c.png"} | (second or {"detections": [turned]}),
    ]
    categories = {"1": "animal", "2": "person"}
    (folder / "md.json").write_text(json.dumps({"images": images, "detection_categories": categories, "info": {}}))
    return folder / "md.json"


BOX, PLAIN = "bb_x,bb_y,bb_width,bb_height", "x,y,width,height"


@pytest.mark.parametrize(
    "write, left_open",
    [
        (lambda folder: text_files(folder, sizes=False), 1),
        (lambda folder: text_files(folder, sizes=True), 0),
        (lambda folder: csv_file(folder, f"file,{BOX},width,height", "20,10,8,6,60,40"), 0),
        (lambda folder: csv_file(folder, f"path,{BOX},width,height", "24,20,6,8,40,60"), 0),
        (lambda folder: csv_file(folder, f" FILE ,{PLAIN},note,note", "24,20,6,8,,"), 1),
        (lambda folder: table(folder, "\t"), 1),
        (lambda folder: table(folder, ";"), 1),
        (coco, 0),
        (megadetector, 0),
    ],
)
def test_every_kind_of_file_finds_the_bird(tmp_path, photographs, write, left_open):
    find = BoxFinder(write(tmp_path), photographs, tmp_path / "images")
    assert len(find) == 2
    for file in photographs:
        [box] = find(file, picture := open_picture(file))
        assert is_red(picture, box), box
    assert list(find.notes().values()) == [0, left_open, 0]


def test_photographs_without_a_box_say_what_there_is_instead(tmp_path, photographs):
    first, second = photographs
    for reason, fields in {
        "no animal of confidence 0.2 or more in ": {"detections": []},
        "the failure 'Failure image access' in ": {"detections": None, "failure": "Failure image access"},
    }.items():
        find = BoxFinder(megadetector(tmp_path, **fields), photographs, tmp_path / "images")
        assert len(find) == 2 and len(find(first, open_picture(first))) == 1
        with pytest.raises(ValueError, match=reason):
            find(second, open_picture(second))
    (tmp_path / "boxes.csv").write_text(f"image,{PLAIN}\n001.Jay/a b.png,,,,\nelsewhere.png,1,2,3,4\n")
    find = BoxFinder(tmp_path / "boxes.csv", photographs, tmp_path / "images")
    assert find(first, open_picture(first)) == [None]  # an empty box is the whole picture
    with pytest.raises(ValueError, match=f"no box in {tmp_path}"):
        find(second, open_picture(second))
    assert find.notes()["boxes are of files that are not among the photographs"] == 1


def test_sizes_of_another_picture_are_counted(tmp_path, photographs):
    file = csv_file(tmp_path, f"file,{BOX},width,height", "24,20,6,8,600,400")
    find = BoxFinder(file, photographs, tmp_path / "images")
    assert [is_red(picture := open_picture(file), *find(file, picture)) for file in photographs] == [True, True]
    assert list(find.notes().values()) == [0, 1, 1]


def test_a_path_means_the_photograph_of_its_folder_and_never_two(tmp_path):
    root = tmp_path / "photos" / "0295"
    a, below, cafe, other = files = [root / name for name in ("a.jpg", "more/a.jpg", "more/cafe\u0301.jpg", "b/x.jpg")]
    assert match(files, root, ["a.jpg"]) == {a: "a.jpg"} | dict.fromkeys((below, cafe, other), "no box")
    names = ["0295/a.jpg", "0295/more/a.jpg", "caf\u00e9.jpg", str(other).lstrip("/")]
    assert match(files, root, names) == dict(zip(files, names, strict=True))
    assert match([below, other.with_name("a.jpg")], root, ["a.jpg"])[below] == "2 photographs may be the 'a.jpg'"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("b.xml", "", "b.xml: boxes come from a bounding_boxes.txt"),
        ("b.csv", f"file|{BOX}\na.jpg|1,2,3,4\n", r"its columns are file\|bb_x, bb_y"),
        ("b.csv", f"name,{BOX}\n", "expected path, file"),
        ("b.csv", "", "its columns are none"),
        ("b.csv", f"file,{BOX}\na.jpg,1,2,3,4\na.jpg,1,2,3\n", "b.csv, row 3: expected file, bb_x"),
        ("b.csv", f"file,{BOX}\na.jpg,1,2,3,4,5\n", "b.csv, row 2: expected file, bb_x"),
        ("b.csv", f"file,{BOX}\na.jpg,1,two,3,4\n", "b.csv, row 2: expected file, bb_x"),
        ("b.csv", f"file,{BOX}\na.jpg,1,,3,4\n", "b.csv, row 2: expected file, bb_x"),
        ("b.csv", f"file,{BOX}\n,1,2,3,4\n", "b.csv, row 2: expected file, bb_x"),
        ("b.csv", f"file,{BOX}\na.jpg,1,inf,3,4\n", "b.csv, row 2: expected file, bb_x"),
        ("b.csv", f"file,{BOX}\na.jpg,0.1,0.2,0.5,1.0\n", "boxes look like shares"),
        ("b.csv", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("b.csv", f"file,{BOX}\nz.jpg,1,2,3,4\n", "none of its 1 files, such as 'z.jpg', is among the 1 photographs"),
        ("b.txt", "1 2 3 4 5\n", "images.txt: there is no such file. A bounding_boxes.txt needs it"),
        ("b.json", "{", "b.json: not JSON"),
        ("b.json", "[]", "neither of COCO's form"),
        ("b.json", '{"images": [{"id": 1, "file_name": "a.jpg"}]}', "neither of COCO's form"),
        ("b.json", '{"images": [], "annotations": []}', "none of its 0 files is among"),
        ("b.json", '{"images": [{"file_name": "a.jpg"}], "annotations": []}', r"b.json, images\[0\]: expected {\"id\""),
        (
            "b.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], "annotations": []}',
            r"b.json, images\[1\]: expected .* with an id of its own",
        ),
        (
            "b.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "bbox": [1, 2, 3, 4]}]}',
            r"annotations\[0\].image_id: no image has the id 2",
        ),
        (
            "b.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3]}]}',
            r"b.json, annotations\[0\]: expected .*bbox",
        ),
        ("b.json", '{"images": [{"file": "a.jpg", "detections": 3}]}', r"images\[0\]: expected .*detections"),
        (
            "b.json",
            '{"images": [{"file": "a.jpg", "detections": [{"category": "1", "conf": 1, "bbox": [10, 20, 30, 40]}]}]}',
            r"images\[0\].detections\[0\]: expected .* in shares of the picture",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        BoxFinder(tmp_path / name, [tmp_path / "a.jpg"], tmp_path)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bounding_boxes.txt", "u-1 1 2 3\n", "bounding_boxes.txt, row 1: expected <id> <x> <y> <width> <height>"),
        ("bounding_boxes.txt", "\nu-1 1 2 3 four\n", "bounding_boxes.txt, row 2: expected <id>"),
        ("bounding_boxes.txt", "u-9 1 2 3 4\n", "row 1: id 'u-9' is not in images.txt"),
        ("images.txt", "u-1 a.jpg\nu-1 b.jpg\n", "images.txt, row 2: id 'u-1' is that of a.jpg too"),
        ("images.txt", "u-1\n", "images.txt, row 1: expected <id> <path>"),
        ("sizes.txt", "u-1 60 wide\n", "sizes.txt, row 1: expected <id> <width> <height>"),
    ],
)
def test_a_mistake_in_the_text_files_is_one_message(tmp_path, name, content, message):
    file = text_files(tmp_path, sizes=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_boxes(file)
