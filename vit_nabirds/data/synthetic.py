"""Draws a small archive of painted birds in NABirds' layout, to try everything without the photographs."""

import math
import random
import uuid
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from vit_nabirds.errors import UserError

_FILES = ["images", "image_class_labels", "bounding_boxes", "sizes", "photographers", "train_test_split"]
_ZOOM = 3  # drawn larger and shrunk, for ImageDraw does not antialias
_PARTS = ["head", "back", "wing", "belly", "breast", "tail", "bill", "cap", "throat", "cheek", "mask", "bars"]


class Plumage(NamedTuple):
    """Colours of `_PARTS` as rgb, - for none of its own; crest, bill and tail in body lengths."""

    name: str
    colours: str
    crest: float
    bill: float
    tail: float


# Species share colours, so that none is told by a single one; plumages of a species differ as real ones do.
PLUMAGES = [
    Plumage("Northern Cardinal (Adult Male)", "c23 b23 923 d33 d33 a22 e84 - - - 222 -", 0.34, 0.17, 0.65),
    Plumage("Northern Cardinal (Female)", "a86 975 944 cb8 ca7 a44 e84 - - - 544 -", 0.34, 0.17, 0.65),
    Plumage("Blue Jay", "47c 47b 36b eee cdd 36a 333 - eee eee - fff", 0.3, 0.2, 0.75),
    Plumage("American Goldfinch (Male)", "ec3 ec2 222 ed4 fd3 223 e95 222 - - - eee", 0.0, 0.13, 0.35),
    Plumage("American Goldfinch  (Female/juvenile)", "ba5 995 444 dc9 cb7 544 d97 - - - - edc", 0.0, 0.13, 0.35),
    Plumage("Eastern Bluebird", "47c 36c 35a eed c73 36b 333 - c73 - - -", 0.0, 0.15, 0.4),
    Plumage("Black-capped Chickadee", "eee 889 677 edc eed 667 222 222 222 - - dee", 0.0, 0.1, 0.5),
    Plumage("American Robin (Adult )", "334 667 556 d63 d63 444 eb4 - - - - -", 0.0, 0.2, 0.5),
    Plumage("Baltimore Oriole (Adult male)", "222 223 333 e83 e82 e83 678 - - - - eee", 0.0, 0.24, 0.55),
    Plumage("Tufted Titmouse", "99a 899 788 eee eed 788 223 - - eee - -", 0.3, 0.11, 0.5),
    Plumage("Cedar Waxwing", "b96 a86 777 ed8 ca7 ec4 222 - - - 222 -", 0.3, 0.11, 0.35),
    Plumage("Scarlet Tanager (Breeding Male)", "d33 c32 222 d33 d33 222 cb8 - - - - -", 0.0, 0.18, 0.4),
]
_FIRST = ["Ada", "Bruno", "Chidi", "Dolores", "Eszter", "Farid", "Greta", "Hiroko", "Ines", "Jonah", "Kavya"]
_LAST = ["Alder", "Birdsall", "Crane O'Hara", "Dunnock, Jr.", 'van "Finch" Dijk', "Gannet-Reyes", "Kestrel"]
_SCENES = {  # the colours of the distance, from top to bottom
    "sky": ["8be", "ace", "cee"],
    "dusk": ["b9c", "eba", "edb"],
    "foliage": ["9b7", "695", "474"],
    "autumn": ["db6", "b85", "874"],
    "water": ["bcc", "7ab", "58a"],
    "snow": ["ccd", "dde", "eef"],
}


def draw_archive(
    folder: str | Path,
    *,
    species: int = 6,
    train: int = 40,
    test: int = 20,
    size: tuple[int, int] = (90, 160),
    seed: int = 0,
) -> None:
    """`train` and `test` images of each species, sides within `size` pixels; equal for equal arguments."""
    names = list(dict.fromkeys(_species(plumage) for plumage in PLUMAGES))
    if not 1 <= species <= len(names) or min(train, test) < 1 or not 32 <= size[0] <= size[1]:
        raise UserError(
            f"species={species} train={train} test={test} size={size}: give 1 to {len(names)} species, "
            "at least 1 train and 1 test image of each, and sides from 32 pixels."
        )
    folder, draw = Path(folder), random.Random(seed)
    plumages = [plumage for plumage in PLUMAGES if _species(plumage) in names[:species]]
    # As in the real archive, the ids of leaf classes are not contiguous.
    leaves = {plumage: 295 + 7 * i + i % 3 for i, plumage in enumerate(plumages)}
    tables = {name: [] for name in _FILES}
    for name in names[:species]:
        worn = [plumage for plumage in plumages if _species(plumage) == name]
        for index in range(train + test):
            identity, plumage = uuid.UUID(int=draw.getrandbits(128), version=4), worn[index % len(worn)]
            path = f"{leaves[plumage]:04d}/{identity.hex}.jpg"
            image, box = draw_bird(plumage, draw.randint(*size), draw.randint(*size), draw)
            (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / "images" / path, quality=92)
            photographer = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
            values = [path, leaves[plumage], box, image.size, photographer, int(index < train)]
            for table, value in zip(tables.values(), values, strict=True):
                table.append((identity, *value) if isinstance(value, tuple) else (identity, value))

    tables = {name: sorted(rows) for name, rows in tables.items()}
    tables["hierarchy"] = [(1, 0), *((leaf, 1) for leaf in leaves.values())]
    tables["classes"] = [(0, "Birds"), (1, "Perching Birds")]
    tables["classes"] += [(leaf, plumage.name) for plumage, leaf in leaves.items()]
    for name, rows in tables.items():
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (folder / f"{name}.txt").write_text(text, newline="\n")


def _species(plumage: Plumage) -> str:
    return plumage.name.split("(")[0].strip()


def draw_bird(plumage: Plumage, width: int, height: int, draw: random.Random) -> tuple[Image.Image, tuple]:
    """An image of one bird in that plumage and its bounding box (x, y, width, height) in pixels."""
    picture = _scene(width, height, draw)
    pen = ImageDraw.Draw(picture, "RGBA")
    colour = dict(zip(_PARTS, plumage.colours.split(), strict=True))
    bill, tail = 0.62 + plumage.bill, 0.42 + plumage.tail
    angle, facing, lean = math.radians(draw.uniform(-16, 16)), draw.choice([-1, 1]), draw.uniform(-0.06, 0.06)
    # A bird is about `bill + tail` long and 1.5 high; the scale leaves it room to move about in the image.
    scale = _ZOOM * draw.uniform(0.62, 0.95) * min(width / (bill + tail), height / 1.6)
    x = scale * (tail if facing > 0 else bill)
    x += draw.uniform(0.1, 0.9) * (_ZOOM * width - scale * (bill + tail))
    y = draw.uniform(0.1, 0.9) * (_ZOOM * height - scale * 1.5) + scale * 0.9
    extent = []

    def place(points: list[tuple]) -> list[tuple]:
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        return [(x + facing * (u * cos - v * sin), y + u * sin + v * cos) for u, v in points]

    def paint(part: str, points: list[tuple], opacity: int = 255) -> None:
        if colour.get(part) != "-":
            placed = place(points)
            extent.extend(placed)
            pen.polygon(placed, fill=(*_shade(colour.get(part, part), draw.uniform(-9, 9)), opacity))

    _perch(pen, place([(0.0, 0.52)])[0], scale, draw)
    for foot in (-0.06, 0.12):
        pen.line(place([(foot, 0.2), (foot - 0.02, 0.5)]), fill=_shade("444", 0), width=round(scale * 0.04))
    droop = draw.uniform(-0.05, 0.2)
    paint("tail", [(-0.3, -0.06), (-tail, droop), (0.05 - tail, droop + 0.16), (-0.3, 0.22)])
    head = (0.36 + lean, -0.36 + lean / 2)
    body = {"centre": (0.0, 0.02), "radii": (0.5, 0.36), "tilt": -22}
    paint("belly", _oval(**body))
    paint("breast", _oval(**body, start=-40, stop=112))
    paint("back", _oval(**body, start=165, stop=335))
    paint("000", _oval(**body, start=50, stop=150), 28)
    if plumage.crest:
        tip = (head[0] - 0.2, head[1] - 0.2 - plumage.crest)
        paint("head", [(head[0] + 0.12, head[1] - 0.2), tip, (head[0] - 0.22, head[1] - 0.04)])
    beak = (head[0] + 0.24 + plumage.bill, head[1] + 0.06)
    paint("bill", [(head[0] + 0.2, head[1] - 0.08), beak, (head[0] + 0.18, head[1] + 0.12)])
    skull = {"centre": head, "radii": (0.27, 0.26), "tilt": 0}
    paint("head", _oval(**skull))
    paint("cheek", _oval((head[0] + 0.04, head[1] + 0.09), (0.17, 0.12), 10))
    paint("throat", _oval(**skull, start=10, stop=120))
    paint("cap", _oval(**skull, start=172, stop=352))
    paint("mask", _oval((head[0] + 0.15, head[1] + 0.02), (0.11, 0.13), 20))
    paint("wing", _oval((-0.2, 0.02), (0.44, 0.21), 168, taper=1.2))
    paint("fff", _oval((-0.16, -0.04), (0.32, 0.1), 168, taper=1.2), 36)
    for bar in (0.0, -0.14):
        paint("bars", _oval((bar, 0.04), (0.03, 0.13), 18))
    for shade, radius, shift in (("eee", 0.066, 0.0), ("111", 0.054, 0.0), ("fff", 0.02, 0.02)):
        paint(shade, _oval((head[0] + 0.1 + shift, head[1] - 0.03 - shift), (radius, radius), 0))

    light, tint = draw.uniform(0.8, 1.12), [draw.uniform(0.95, 1.05) for _ in "RGB"]
    table = [min(round(value * light * channel), 255) for channel in tint for value in range(256)]
    across, down = zip(*extent, strict=True)
    left, top = math.floor(min(across) / _ZOOM), math.floor(min(down) / _ZOOM)
    box = (left, top, math.ceil(max(across) / _ZOOM) - left, math.ceil(max(down) / _ZOOM) - top)
    return picture.reduce(_ZOOM).point(table), box


def _scene(width: int, height: int, draw: random.Random) -> Image.Image:
    """An empty landscape out of focus: few blotches, enlarged smoothly."""
    colours, rough = _SCENES[draw.choice(list(_SCENES))], draw.uniform(4, 26)
    rows = [_shade(colours[row * 3 // 7], draw.uniform(-rough, rough)) for row in range(7) for _ in range(7)]
    blotches = Image.frombytes("RGB", (7, 7), bytes(value for row in rows for value in row))
    distance = blotches.resize((width, height), Image.Resampling.BICUBIC)
    return distance.resize((_ZOOM * width, _ZOOM * height), Image.Resampling.NEAREST)


def _perch(pen: ImageDraw.ImageDraw, foot: tuple, scale: float, draw: random.Random) -> None:
    """A branch through the whole image on which the bird stands, with some leaves."""
    bark, slope = draw.choice(["654", "876", "544", "787"]), draw.uniform(-0.25, 0.25)
    thick = scale * draw.uniform(0.07, 0.16)
    far = [(foot[0] + step, foot[1] + thick / 3 + step * slope) for step in (-9 * scale, 9 * scale)]
    pen.line(far, fill=_shade(bark, draw.uniform(-16, 16)), width=round(thick))
    leaf = draw.choice(["594", "8a4", "c84"])
    for _ in range(draw.randint(0, 6)):
        step, spread = draw.uniform(-2, 2) * scale, draw.choice([-1, 1])
        stalk = (foot[0] + step, foot[1] + step * slope + spread * scale * 0.16)
        points = _oval(stalk, (scale * 0.2, scale * 0.11), draw.uniform(30, 150), taper=0.7)
        pen.polygon(points, fill=_shade(leaf, draw.uniform(-16, 16)))


def _oval(centre: tuple, radii: tuple, tilt: float, start=0, stop=360, taper=0.0) -> list[tuple]:
    """Outline of an ellipse, or its segment from `start` to `stop` degrees; `taper` makes one end a point."""
    cos, sin, points = math.cos(math.radians(tilt)), math.sin(math.radians(tilt)), []
    for step in range(33):
        t = math.radians(start + (stop - start) * step / 32)
        u, v = radii[0] * math.cos(t), radii[1] * math.sin(t) * abs(math.sin(t / 2)) ** taper
        points.append((centre[0] + u * cos - v * sin, centre[1] + u * sin + v * cos))
    return points


def _shade(colour: str, by: float) -> tuple[int, int, int]:
    return tuple(min(max(round(int(digit, 16) * 17 + by), 0), 255) for digit in colour)
