"""Draws a small archive of painted birds in NABirds' layout, to try everything without real photographs."""

import math
import random
import uuid
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from vit_nabirds.errors import UserError

_FILES = ["images", "image_class_labels", "bounding_boxes", "sizes", "photographers", "train_test_split"]
_ZOOM = 3  # draw larger and shrink, because ImageDraw does not antialias
_PARTS = ["head", "back", "wing", "belly", "breast", "tail", "bill", "cap", "throat", "cheek", "mask", "bars"]


class Plumage(NamedTuple):
    """The colours of `_PARTS` as rgb digits, "-" for a part it does not have; crest, bill and tail in body lengths."""

    name: str
    colours: str
    crest: float
    bill: float
    tail: float


# Species share colours, so that no single colour identifies one. Plumages of a species differ, as real ones do.
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
_FAMILIES = {
    "Northern Cardinal": "Cardinals and Allies",
    "Blue Jay": "Jays",
    "American Goldfinch": "Finches",
    "Eastern Bluebird": "Thrushes",
    "Black-capped Chickadee": "Chickadees and Titmice",
    "American Robin": "Thrushes",
    "Baltimore Oriole": "Orioles",
    "Tufted Titmouse": "Chickadees and Titmice",
    "Cedar Waxwing": "Waxwings",
    "Scarlet Tanager": "Cardinals and Allies",
}
_FIRST = ["Ada", "Bruno", "Chidi", "Dolores", "Eszter", "Farid", "Greta", "Hiroko", "Ines", "Jonah", "Kavya"]
_LAST = ["Alder", "Birdsall", "Crane O'Hara", "Dunnock, Jr.", 'van "Finch" Dijk', "Gannet-Reyes", "Kestrel"]
# Colours of a background from top to bottom: sky, dusk, foliage, autumn, water, snow.
_SCENES = ["8be ace cee", "b9c eba edb", "9b7 695 474", "db6 b85 874", "bcc 7ab 58a", "ccd dde eef"]


def draw_archive(
    folder: str | Path, *, species: int = 6, train: int = 40, test: int = 20, size: tuple = (90, 160), seed: int = 0
) -> None:
    """Write `train` and `test` images per species, with sides within `size` pixels: the same for equal arguments."""
    names = list(_FAMILIES)
    if not 1 <= species <= len(names) or min(train, test) < 1 or not 32 <= size[0] <= size[1]:
        raise UserError(
            f"species={species} train={train} test={test} size={size}: give 1 to {len(names)} species, "
            "at least 1 train and 1 test image of each, and sides from 32 pixels."
        )
    folder, draw, rows = Path(folder), random.Random(seed), []
    plumages = [plumage for plumage in PLUMAGES if _species(plumage) in names[:species]]
    # As in the real archive, the ids of leaf classes are not contiguous.
    leaves = {plumage: 295 + 7 * i + i % 3 for i, plumage in enumerate(plumages)}
    for name in names[:species]:
        worn = [plumage for plumage in plumages if _species(plumage) == name]
        for index in range(train + test):
            identity, plumage = uuid.UUID(int=draw.getrandbits(128), version=4), worn[index % len(worn)]
            file = folder / "images" / f"{leaves[plumage]:04d}" / f"{identity.hex}.jpg"
            image, box = draw_bird(plumage, draw.randint(*size), draw.randint(*size), draw)
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, quality=92)
            box, sides = (" ".join(map(str, numbers)) for numbers in (box, image.size))
            photographer = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
            path = f"{file.parent.name}/{file.name}"
            rows.append((identity, path, leaves[plumage], box, sides, photographer, int(index < train)))

    identities, *columns = zip(*sorted(rows), strict=True)
    tables = {name: zip(identities, values, strict=True) for name, values in zip(_FILES, columns, strict=True)}
    families = {name: number for number, name in enumerate(dict.fromkeys(map(_FAMILIES.get, names[:species])), 1)}
    tables["hierarchy"] = [(number, 0) for number in families.values()]
    tables["hierarchy"] += [(leaf, families[_FAMILIES[_species(plumage)]]) for plumage, leaf in leaves.items()]
    tables["classes"] = [(0, "Birds"), *((number, name) for name, number in families.items())]
    tables["classes"] += [(leaf, plumage.name) for plumage, leaf in leaves.items()]
    for name, table in tables.items():
        text = "".join(f"{key} {value}\n" for key, value in table)
        (folder / f"{name}.txt").write_text(text, newline="\n")


def _species(plumage: Plumage) -> str:
    return plumage.name.split("(")[0].strip()


def draw_bird(plumage: Plumage, width: int, height: int, draw: random.Random) -> tuple[Image.Image, tuple]:
    """An image of one bird in that plumage, and its bounding box (x, y, width, height) in pixels."""
    picture = _scene(width, height, draw)
    pen = ImageDraw.Draw(picture, "RGBA")
    bill, tail = 0.62 + plumage.bill, 0.42 + plumage.tail
    angle, facing, lean = math.radians(draw.uniform(-16, 16)), draw.choice([-1, 1]), draw.uniform(-0.06, 0.06)
    # A bird is about `bill + tail` long and 1.5 high; the scale leaves it some space in the image.
    scale = _ZOOM * draw.uniform(0.62, 0.95) * min(width / (bill + tail), height / 1.6)
    x = scale * (tail if facing > 0 else bill)
    x += draw.uniform(0.1, 0.9) * (_ZOOM * width - scale * (bill + tail))
    y = draw.uniform(0.1, 0.9) * (_ZOOM * height - scale * 1.5) + scale * 0.9
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale

    def place(points: list[tuple]) -> list[tuple]:
        return [(x + facing * (u * cos - v * sin), y + u * sin + v * cos) for u, v in points]

    _perch(pen, place([(0.0, 0.52)])[0], scale, draw)
    for foot in (-0.06, 0.12):
        pen.line(place([(foot, 0.2), (foot - 0.02, 0.5)]), fill=_shade("444", 0), width=round(scale * 0.04))
    colours, outline = dict(zip(_PARTS, plumage.colours.split(), strict=True)), []
    for part, points, opacity in _shapes(plumage, lean, draw.uniform(-0.05, 0.2)):
        colour = colours.get(part, part)
        if colour != "-":
            outline += place(points)
            pen.polygon(place(points), fill=(*_shade(colour, draw.uniform(-9, 9)), opacity))

    light, tint = draw.uniform(0.8, 1.12), [draw.uniform(0.95, 1.05) for _ in "RGB"]
    curves = [min(round(value * light * channel), 255) for channel in tint for value in range(256)]
    across, down = zip(*outline, strict=True)
    left, top = math.floor(min(across) / _ZOOM), math.floor(min(down) / _ZOOM)
    box = (left, top, math.ceil(max(across) / _ZOOM) - left, math.ceil(max(down) / _ZOOM) - top)
    return picture.reduce(_ZOOM).point(curves), box


def _shapes(plumage: Plumage, lean: float, droop: float) -> list[tuple]:
    """(part or colour, points, opacity), from back to front; the body's centre is 0, 0 and its length 1."""
    tail, x, y = 0.42 + plumage.tail, 0.36 + lean, -0.36 + lean / 2  # x, y: the centre of the head
    body = {"centre": (0.0, 0.02), "radii": (0.5, 0.36), "tilt": -22}
    skull = {"centre": (x, y), "radii": (0.27, 0.26), "tilt": 0}
    crest = [(x + 0.12, y - 0.2), (x - 0.2, y - 0.2 - plumage.crest), (x - 0.22, y - 0.04)]
    eye = [("eee", 0.066, 0.0), ("111", 0.054, 0.0), ("fff", 0.02, 0.02)]
    return [
        ("tail", [(-0.3, -0.06), (-tail, droop), (0.05 - tail, droop + 0.16), (-0.3, 0.22)], 255),
        ("belly", _oval(**body), 255),
        ("breast", _oval(**body, start=-40, stop=112), 255),
        ("back", _oval(**body, start=165, stop=335), 255),
        ("000", _oval(**body, start=50, stop=150), 28),
        ("head" if plumage.crest else "-", crest, 255),
        ("bill", [(x + 0.2, y - 0.08), (x + 0.24 + plumage.bill, y + 0.06), (x + 0.18, y + 0.12)], 255),
        ("head", _oval(**skull), 255),
        ("cheek", _oval((x + 0.04, y + 0.09), (0.17, 0.12), 10), 255),
        ("throat", _oval(**skull, start=10, stop=120), 255),
        ("cap", _oval(**skull, start=172, stop=352), 255),
        ("mask", _oval((x + 0.15, y + 0.02), (0.11, 0.13), 20), 255),
        ("wing", _oval((-0.2, 0.02), (0.44, 0.21), 168, taper=1.2), 255),
        ("fff", _oval((-0.16, -0.04), (0.32, 0.1), 168, taper=1.2), 36),
        *[("bars", _oval((bar, 0.04), (0.03, 0.13), 18), 255) for bar in (0.0, -0.14)],
        *[(shade, _oval((x + 0.1 + shift, y - 0.03 - shift), (r, r), 0), 255) for shade, r, shift in eye],
    ]


def _scene(width: int, height: int, draw: random.Random) -> Image.Image:
    """A blurred landscape: a few blotches, enlarged smoothly."""
    colours, rough = draw.choice(_SCENES).split(), draw.uniform(4, 26)
    rows = [_shade(colours[row * 3 // 7], draw.uniform(-rough, rough)) for row in range(7) for _ in range(7)]
    blotches = Image.frombytes("RGB", (7, 7), bytes(value for row in rows for value in row))
    background = blotches.resize((width, height), Image.Resampling.BICUBIC)
    return background.resize((_ZOOM * width, _ZOOM * height), Image.Resampling.NEAREST)


def _perch(pen: ImageDraw.ImageDraw, foot: tuple, scale: float, draw: random.Random) -> None:
    """Draw the branch that the bird stands on, across the whole image, with some leaves."""
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
    """The outline of an ellipse, or of its segment from `start` to `stop` degrees; `taper` makes one end a point."""
    cos, sin, points = math.cos(math.radians(tilt)), math.sin(math.radians(tilt)), []
    for step in range(33):
        t = math.radians(start + (stop - start) * step / 32)
        u, v = radii[0] * math.cos(t), radii[1] * math.sin(t) * abs(math.sin(t / 2)) ** taper
        points.append((centre[0] + u * cos - v * sin, centre[1] + u * sin + v * cos))
    return points


def _shade(colour: str, by: float) -> tuple[int, int, int]:
    return tuple(min(max(round(int(digit, 16) * 17 + by), 0), 255) for digit in colour)
