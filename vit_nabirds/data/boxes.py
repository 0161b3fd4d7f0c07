"""Boxes around the birds of photographs, from the files in which data sets and detectors state them."""

import collections
import contextlib
import csv
import io
import json
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vit_nabirds.data.archives.listing import BOX
from vit_nabirds.data.archives.tables import CORNERS, NAMES
from vit_nabirds.data.crops import Box
from vit_nabirds.data.foreign import read_text
from vit_nabirds.data.pictures import Picture
from vit_nabirds.errors import ConfigError, UserError, quoted

MIN_CONFIDENCE = 0.2  # of MegaDetector's animals: the threshold that its authors suggest for version 5
FILE_COLUMNS, BOX_COLUMNS = NAMES["source"], (BOX, CORNERS, ["x", "y", "width", "height"])

# What `float` takes of text, but no digits of other scripts and no underscores between them.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

Size = tuple[int, int]  # width, height


def to_upright(box: Box, sizes: Size | None, picture: Picture) -> tuple[Box, bool]:
    """The box in the upright picture, and whether its frame was left open where that matters.

    The stated `sizes` (width, height) tell the frame if they are those of the upright picture alone, or of the pixels
    as stored alone; else the box does, if it lies inside one of the two alone. A box of which neither tells (a half
    turn, a mirrored picture, a square) is taken as of the upright picture, which is what people and most programs see.
    """
    if picture.orientation == 1:
        return box, False
    for is_frame in (lambda frame: sizes == frame, lambda frame: lies_in(box, frame)):
        stored, upright = is_frame(picture.stored_size), is_frame(picture.size)
        if stored != upright:
            return (picture.upright(box) if stored else box), False
    return box, True


def lies_in(box: Box, size: Size) -> bool:
    """Whether a box lies in a picture of (width, height), but for a pixel."""
    return min(box[:2]) > -1 and box[0] + box[2] < size[0] + 1 and box[1] + box[3] < size[1] + 1


class StatedBox(NamedTuple):
    """A box as its file states it."""

    box: Box | None  # None: the whole picture
    sizes: Size | None = None  # of its frame, where the file has them
    relative: bool = False  # in shares of the upright picture's width and height, not in pixels

    def upright(self, picture: Picture) -> tuple[Box | None, bool]:
        """As `to_upright` returns it."""
        if self.box is None:
            return None, False
        if self.relative:
            return tuple(share * side for share, side in zip(self.box, picture.size * 2, strict=True)), False
        return to_upright(self.box, self.sizes, picture)


Stated = list[StatedBox] | str  # of one photograph; or what there is instead
Row = tuple[str, StatedBox | str]  # a photograph's path, and one of its boxes, or what there is if it has none
NO_BOX, NO_ANIMAL = "no box", f"no animal of confidence {MIN_CONFIDENCE} or more"


class BoxFinder:
    """Finds the boxes that a file states for `photographs`, which lie below the folder `root`."""

    def __init__(self, file: Path, photographs: list[Path], root: Path):
        stated = read_boxes(file)
        self.file, names = file, match(photographs, root, stated)
        if not any(name in stated for name in names.values()):
            example = f", such as '{quoted(next(iter(stated)))}'," if stated else ""
            raise UserError(
                f"{file}: none of its {len(stated):,} files{example} is among the {len(photographs):,} photographs in "
                f"{root}. Give the folder to which its paths are relative."
            )
        self._stated = {photograph: stated.get(name, name) for photograph, name in names.items()}
        self._unused = _count(stated[name] for name in stated.keys() - set(names.values()))
        self._left_open, self._other_sizes = [], []  # of each box; appended to by threads

    def __len__(self) -> int:
        """Boxes, and photographs without one."""
        return sum(1 if isinstance(stated, str) else len(stated) for stated in self._stated.values())

    def __call__(self, photograph: Path, picture: Picture) -> list[Box | None]:
        """Its boxes in the upright picture (None: all of it). ValueError says what there is instead."""
        stated, boxes = self._stated[photograph], []
        if isinstance(stated, str):
            raise ValueError(f"{stated} in {self.file}")
        for one in stated:
            box, left_open = one.upright(picture)
            boxes.append(box)
            self._left_open.append(left_open)
            self._other_sizes.append(one.sizes not in (None, picture.size, picture.stored_size))
        return boxes

    def notes(self) -> dict[str, int]:
        """What was odd about the boxes, and how many were."""
        return {
            "boxes are of files that are not among the photographs": self._unused,
            "boxes of photographs that EXIF turns do not say if they are turned too: taken as turned": sum(
                self._left_open
            ),
            "boxes refer to another size than their photograph has: taken as they are": sum(self._other_sizes),
        }


def _count(stated: Iterable[Stated]) -> int:
    return sum(len(boxes) for boxes in stated if not isinstance(boxes, str))


def match(photographs: list[Path], root: Path, names: Collection[str]) -> dict[Path, str]:
    """The name that means each photograph: its path below `root`, or else the longest end of its whole path.

    If no name means a photograph, or one might mean several, what there is instead.
    """
    exact = {file: name for file in photographs if (name := _plain(file.relative_to(root))) in names}
    taken = set(exact.values())
    loose = {file: _longest_end(file, names) for file in photographs if file not in exact}
    users = collections.Counter(loose.values())
    for file, name in loose.items():
        if name is None or name in taken:
            loose[file] = NO_BOX
        elif users[name] > 1:
            loose[file] = f"{users[name]} photographs may be the '{quoted(name)}'"
    return exact | loose


def _longest_end(file: Path, names: Collection[str]) -> str | None:
    parts = _plain(os.path.abspath(file)).split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in names), None)


def _plain(path: str | Path) -> str:
    """A path in one form, whatever system wrote it, relative to the root of its disk."""
    return unicodedata.normalize("NFC", posixpath.normpath(str(path).replace("\\", "/")).lstrip("/"))


def read_boxes(file: Path) -> dict[str, Stated]:
    """What a file states of each photograph, by its path there, in plain form; UserError for a mistake in the file."""
    read = {".txt": _read_lines, ".csv": _read_table, ".tsv": _read_table, ".json": _read_json}.get(file.suffix.lower())
    if not read:
        raise ConfigError(
            f"{file}: boxes come from a bounding_boxes.txt with images.txt beside it, from a .csv, or from a .json of "
            "COCO's or MegaDetector's form."
        )
    boxes, others = {}, {}
    for name, box in read(file):
        if isinstance(box, str):
            others[_plain(name)] = box
        else:
            boxes.setdefault(_plain(name), []).append(box)
    pixels = [one.box for stated in boxes.values() for one in stated if one.box and not one.relative]
    if pixels and max(map(max, pixels)) <= 1:
        raise UserError(f"{file}: its boxes look like shares of the photographs, all up to 1. Give them in pixels.")
    return others | boxes


def _read_lines(file: Path) -> Iterator[Row]:
    """bounding_boxes.txt of NABirds or CUB-200-2011, with images.txt and perhaps sizes.txt beside it."""
    names, sizes, beside = {}, {}, file.with_name("sizes.txt")
    for where, (key, name) in _lines(file.with_name("images.txt"), "<id> <path>"):
        if names.setdefault(key, name) != name:
            raise UserError(f"{where}: id '{quoted(key)}' is that of {quoted(names[key])} too. Correct one of them.")
    for where, (key, *size) in _lines(beside, form := "<id> <width> <height>") if beside.exists() else ():
        with _expecting(form, where):
            sizes[key] = _sizes(*size)
    yield from ((name, NO_BOX) for name in names.values())
    for where, (key, *numbers) in _lines(file, form := "<id> <x> <y> <width> <height>"):
        if key not in names:
            raise UserError(f"{where}: id '{quoted(key)}' is not in images.txt. Correct one of them.")
        with _expecting(form, where):
            box = StatedBox(_box(numbers), sizes.get(key))
        yield names[key], box


def _lines(file: Path, form: str) -> Iterator[tuple[str, list[str]]]:
    """Where it is, and the fields, of each row that is not blank."""
    count = form.count("<")
    for row, line in enumerate(_text(file).split("\n"), start=1):
        fields = line.strip().split(maxsplit=count - 1)
        if fields and len(fields) != count:
            raise UserError(f"{file}, row {row}: expected {form}. Correct it.")
        if fields:
            yield f"{file}, row {row}", fields


def _read_table(file: Path) -> Iterator[Row]:
    """A .csv with a column of paths and four of boxes, and perhaps width and height of the frame. Empty: no box."""
    text = _text(file)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    try:
        columns = reader.fieldnames = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in reader.fieldnames or []]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{file}, row {reader.line_num}: {quoted(error)}. Correct it.") from None
    path = next((name for name in FILE_COLUMNS if name in columns), None)
    box = next((names for names in BOX_COLUMNS if set(names) <= set(columns)), None)
    if not path or not box:
        raise UserError(
            f"{file}: its columns are {quoted(', '.join(columns)) or 'none'}; expected {', '.join(FILE_COLUMNS[:-1])} "
            f"or {FILE_COLUMNS[-1]}, and {' or '.join(', '.join(names) for names in BOX_COLUMNS)}."
        )
    size = [name for name in ("width", "height") if name in columns and name not in box]
    for number, row in rows:
        with _expecting(f"{path}, {', '.join(box)}", f"{file}, row {number}"):
            if None in row:  # it has more fields than columns
                raise ValueError
            name, values = _name(row[path].strip()), [row[column].strip() for column in box]
            sizes = _sizes(*(row[column].strip() for column in size)) if len(size) == 2 else None
            numbers = _box(values) if any(values) else None
            if numbers and box is CORNERS:
                left, top, right, bottom = numbers
                numbers = left, top, right - left, bottom - top
        yield name, StatedBox(numbers, sizes)


def _read_json(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({quoted(error)}). Write it again.") from None
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        return _read_coco(file, content)
    if isinstance(images, list) and all(isinstance(image, dict) and "file" in image for image in images):
        return _read_megadetector(file, content)
    raise UserError(
        f"{file}: neither of COCO's form (lists 'images' and 'annotations') nor of MegaDetector's (a list 'images' of "
        "objects with a 'file'). Give one that is."
    )


def _read_coco(file: Path, content: dict) -> Iterator[Row]:
    images = {}
    for i, image in enumerate(content["images"]):
        with _expecting('{"id": …, "file_name": "…", …} with an id of its own', f"{file}, images[{i}]"):
            name, sizes = _name(image["file_name"]), _sizes(image.get("width"), image.get("height"))
            if images.setdefault(image["id"], (name, sizes)) != (name, sizes):
                raise ValueError
        yield name, NO_BOX
    for i, annotation in enumerate(content["annotations"]):
        with _expecting('{"image_id": …, "bbox": [x, y, width, height], …}', where := f"{file}, annotations[{i}]"):
            image, numbers = annotation["image_id"], annotation.get("bbox")
            box = _box(numbers) if numbers and not annotation.get("iscrowd") else None
            if image not in images:
                raise UserError(f"{where}.image_id: no image has the id {quoted(image)}. Correct it.")
        if box:
            name, sizes = images[image]
            yield name, StatedBox(box, sizes)


def _read_megadetector(file: Path, content: dict) -> Iterator[Row]:
    with _expecting('{"1": "animal", …}', f"{file}, detection_categories"):
        categories = content.get("detection_categories", {"1": "animal"})
        animals = {key for key, name in categories.items() if name == "animal"}
    for i, image in enumerate(content["images"]):
        where = f"{file}, images[{i}]"
        with _expecting('{"file": "…", "detections": […], …}', where):
            name, failure, detections = _name(image["file"]), image.get("failure"), image.get("detections") or []
            detections = dict(enumerate(detections))
            if failure and not isinstance(failure, str):
                raise ValueError
        yield name, f"the failure '{quoted(failure)}'" if failure else NO_ANIMAL
        for j, detection in detections.items():
            form = '{"category": "1", "conf": 0.9, "bbox": [x, y, width, height], in shares of the picture}'
            with _expecting(form, f"{where}.detections[{j}]"):
                wanted = detection["category"] in animals and _number(detection["conf"]) >= MIN_CONFIDENCE
                box = _box(detection["bbox"], most=1.01)
            if wanted:
                yield name, StatedBox(box, relative=True)


def _box(values: Iterable, most: float = math.inf) -> Box:
    """Four numbers up to `most`."""
    left, top, width, height = box = tuple(_number(value) for value in values)
    if max(box) > most:
        raise ValueError
    return left, top, width, height


def _sizes(width: object, height: object) -> Size | None:
    sizes = (int(_number(width)), int(_number(height))) if width and height else (0, 0)
    return sizes if min(sizes) > 0 else None


def _number(value: object) -> float:
    """Of text or JSON; ValueError for one that no picture has."""
    if isinstance(value, bool) or isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError
    number = float(value)
    if not abs(number) < 1e9:
        raise ValueError
    return number


def _name(name: object) -> str:
    if not name or not isinstance(name, str):
        raise ValueError
    return name


@contextlib.contextmanager
def _expecting(form: str, where: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        raise UserError(f"{where}: expected {form}. Correct it.") from None


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except FileNotFoundError:
        beside = " A bounding_boxes.txt needs it beside it." if file.name == "images.txt" else ""
        raise UserError(f"{file}: there is no such file.{beside}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {quoted(error)}") from None
