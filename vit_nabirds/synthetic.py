"""Draws a small archive of painted birds in NABirds' layout, for trying everything out without the photographs."""

import math
import random
import uuid
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from vit_nabirds.errors import UserError

_FILES = ["images", "image_class_labels", "bounding_boxes", "sizes", "photographers", "train_test_split"]
_ZOOM = 3  # drawn larger and shrunk, for ImageDraw does not antialias


class Plumage(NamedTuple):
    """Colours as #rrggbb, '' where it has none of its own; lengths in body lengths."""

    name: str
    family: str
    head: str
    back: str
    wing: str
    belly: str
    breast: str
    tail: str
    bill: str
    cap: str = ""
    throat: str = ""
    cheek: str = ""
    mask: str = ""
    bars: str = ""
    crest: float = 0.0
    bill_length: float = 0.2
    tail_length: float = 0.45


# Species share colours, so that none is told by a single one; plumages of a species differ as the real ones do.
# fmt: off
PLUMAGES = [
    Plumage("Northern Cardinal (Adult Male)", "Cardinals and Allies", "#d42a2e", "#b8242c", "#9c2630", "#d8383a",
            "#dc3434", "#a8222a", "#f0803c", mask="#2a1c1e", crest=0.34, bill_length=0.17, tail_length=0.65),
    Plumage("Northern Cardinal (Female/Juvenile)", "Cardinals and Allies", "#b08a62", "#9a7a5a", "#a0483c", "#d2b48c",
            "#c8a276", "#a44a3e", "#f0803c", mask="#5a4640", crest=0.34, bill_length=0.17, tail_length=0.65),
    Plumage("Blue Jay", "Jays, Magpies, and Crows", "#4a7cc8", "#4474c0", "#3a66b4", "#e8ecf0", "#d4dae2", "#3460b0",
            "#2c2c34", cheek="#f0f2f4", throat="#f0f2f4", bars="#f8fafc", crest=0.3, tail_length=0.75),
    Plumage("American Goldfinch (Breeding Male)", "Finches and Allies", "#f4d02c", "#f0c828", "#26262a", "#f6d840",
            "#f8d830", "#2a2a2e", "#f09c50", cap="#222226", bars="#f4f4ec", bill_length=0.13, tail_length=0.35),
    Plumage("American Goldfinch  (Female/Nonbreeding Male)", "Finches and Allies", "#b8ac58", "#a0965a", "#4a463e",
            "#dcd4a0", "#ccc070", "#4e4a42", "#d8a070", bars="#ece4cc", bill_length=0.13, tail_length=0.35),
    Plumage("Eastern Bluebird", "Thrushes and Allies", "#3c70c4", "#3a6cc4", "#305cb0", "#eeeae2", "#d4743a",
            "#3260b8", "#2c2c34", throat="#d4743a", bill_length=0.15, tail_length=0.4),
    Plumage("Black-capped Chickadee", "Tits, Chickadees, and Titmice", "#f0f0ec", "#8c9098", "#6c7078", "#ecdcc4",
            "#f0ece4", "#6a6e76", "#26262a", cap="#1e1e22", throat="#1e1e22", bars="#e4e6e8", bill_length=0.1,
            tail_length=0.5),
    Plumage("American Robin (Adult )", "Thrushes and Allies", "#36383e", "#6a6c72", "#585a62", "#d8622e", "#dc6a30",
            "#3e4046", "#f0bc3c", bill_length=0.2, tail_length=0.5),
    Plumage("Baltimore Oriole (Adult male)", "Blackbirds and Allies", "#222226", "#28282c", "#2c2c30", "#f4882c",
            "#f4842a", "#f09038", "#6c7884", bars="#f4f4f0", bill_length=0.24, tail_length=0.55),
    Plumage("Tufted Titmouse", "Tits, Chickadees, and Titmice", "#9aa0aa", "#8c929c", "#7c828c", "#f0ece6", "#ece8e4",
            "#7e848e", "#2a2a2e", cheek="#e8e8e8", crest=0.3, bill_length=0.11, tail_length=0.5),
    Plumage("Cedar Waxwing", "Waxwings", "#c09a6c", "#a8875f", "#7c787a", "#ecdc8c", "#c8a474", "#f0d040", "#26262a",
            mask="#1e1a1c", crest=0.3, bill_length=0.11, tail_length=0.35),
    Plumage("Scarlet Tanager (Breeding Male)", "Cardinals and Allies", "#dc302c", "#d42c2a", "#222226", "#dc3a34",
            "#e03832", "#242428", "#c8b890", bill_length=0.18, tail_length=0.4),
]
# fmt: on
_FIRST = ["Ada", "Bruno", "Chidi", "Dolores", "Eszter", "Farid", "Greta", "Hiroko", "Ines", "Jonah", "Kavya"]
_LAST = [
    "Alder",
    "Birdsall",
    "Crane O'Hara",
    "Dunnock, Jr.",
    'van "Finch" Dijk',
    "Gannet-Reyes",
    "Hobby",
    "Kestrel",
]
_SCENES = {  # the colours of the distance, from top to bottom
    "sky": ["#8cc0ec", "#a8d0f0", "#d4e6f4"],
    "dusk": ["#b8a0c4", "#ecc0a8", "#f4dcb4"],
    "foliage": ["#9cc078", "#6c9c54", "#4c7840"],
    "autumn": ["#d8b46c", "#b88c50", "#8c7048"],
    "water": ["#b4ccd4", "#7ca8bc", "#5c8ca4"],
    "snow": ["#c8d4e0", "#dce4ec", "#f0f4f8"],
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
    """`train` and `test` images of each species, sides within `size` pixels; the same for the same arguments."""
    names = list(dict.fromkeys(_species(plumage) for plumage in PLUMAGES))
    if not 1 <= species <= len(names) or min(train, test) < 1 or not 32 <= size[0] <= size[1]:
        raise UserError(
            f"species={species} train={train} test={test} size={size}: give 1 to {len(names)} species, at least 1 "
            "train and 1 test image of each, and sides from 32 pixels."
        )
    folder, draw = Path(folder), random.Random(seed)
    plumages = [plumage for plumage in PLUMAGES if _species(plumage) in names[:species]]
    leaves = {
        plumage: 295 + 7 * i + i % 3 for i, plumage in enumerate(plumages)
    }  # not contiguous, as the real
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

    families = list(dict.fromkeys(plumage.family for plumage in plumages))
    parents = [(1 + families.index(plumage.family)) for plumage in plumages]
    tables = {name: sorted(rows) for name, rows in tables.items()}
    tables["hierarchy"] = [(i, 0) for i, _ in enumerate(families, 1)] + list(zip(leaves.values(), parents))
    names = [plumage.name for plumage in plumages]
    tables["classes"] = [(0, "Birds"), *enumerate(families, 1), *zip(leaves.values(), names)]
    for name, rows in tables.items():
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (folder / f"{name}.txt").write_text(text, newline="\n")


def _species(plumage: Plumage) -> str:
    return plumage.name.split("(")[0].strip()


def draw_bird(plumage: Plumage, width: int, height: int, draw: random.Random) -> tuple[Image.Image, tuple]:
    """An image of one bird in that plumage and its bounding box (x, y, width, height) in pixels."""
    picture = _scene(width, height, draw)
    pen = ImageDraw.Draw(picture, "RGBA")
    bill, tail = 0.62 + plumage.bill_length, 0.42 + plumage.tail_length
    angle, facing, lean = math.radians(draw.uniform(-16, 16)), draw.choice([-1, 1]), draw.uniform(-0.06, 0.06)
    # A bird is about `bill + tail` long and 1.5 high; the scale leaves it room to move about in the image.
    scale = _ZOOM * draw.uniform(0.62, 0.95) * min(width / (bill + tail), height / 1.6)
    x = draw.uniform(0.1, 0.9) * (_ZOOM * width - scale * (bill + tail)) + scale * (
        tail if facing > 0 else bill
    )
    y = draw.uniform(0.1, 0.9) * (_ZOOM * height - scale * 1.5) + scale * 0.9
    extent = []

    def place(points: list[tuple]) -> list[tuple]:
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        return [(x + facing * (u * cos - v * sin), y + u * sin + v * cos) for u, v in points]

    def paint(colour: str, points: list[tuple], opacity: int = 255) -> None:
        if colour:
            placed = place(points)
            extent.extend(placed)
            pen.polygon(placed, fill=(*_shade(colour, draw.uniform(-9, 9)), opacity))

    _perch(pen, place([(0.0, 0.52)])[0], scale, draw)
    for foot in (-0.06, 0.12):
        pen.line(place([(foot, 0.2), (foot - 0.02, 0.5)]), fill="#4c4040", width=round(scale * 0.04))
    droop = draw.uniform(-0.05, 0.2)
    paint(plumage.tail, [(-0.3, -0.06), (-tail, droop), (0.05 - tail, droop + 0.16), (-0.3, 0.22)])
    head = (0.36 + lean, -0.36 + lean / 2)
    body = dict(centre=(0.0, 0.02), radii=(0.5, 0.36), tilt=-22)
    paint(plumage.belly, _oval(**body))
    paint(plumage.breast, _oval(**body, start=-40, stop=112))
    paint(plumage.back, _oval(**body, start=165, stop=335))
    paint("#000000", _oval(**body, start=50, stop=150), 28)
    if plumage.crest:
        top, back = (head[0] + 0.12, head[1] - 0.2), (head[0] - 0.22, head[1] - 0.04)
        paint(plumage.cap or plumage.head, [top, (head[0] - 0.2, head[1] - 0.2 - plumage.crest), back])
    beak = (head[0] + 0.24 + plumage.bill_length, head[1] + 0.06)
    paint(plumage.bill, [(head[0] + 0.2, head[1] - 0.08), beak, (head[0] + 0.18, head[1] + 0.12)])
    skull = dict(centre=head, radii=(0.27, 0.26), tilt=0)
    paint(plumage.head, _oval(**skull))
    paint(plumage.cheek, _oval((head[0] + 0.04, head[1] + 0.09), (0.17, 0.12), 10))
    paint(plumage.throat, _oval(**skull, start=10, stop=120))
    paint(plumage.cap, _oval(**skull, start=172, stop=352))
    paint(plumage.mask, _oval((head[0] + 0.15, head[1] + 0.02), (0.11, 0.13), 20))
    paint(plumage.wing, _oval((-0.2, 0.02), (0.44, 0.21), 168, taper=1.2))
    paint("#ffffff", _oval((-0.16, -0.04), (0.32, 0.1), 168, taper=1.2), 36)
    if plumage.bars:
        for bar in (0.0, -0.14):
            paint(plumage.bars, _oval((bar, 0.04), (0.03, 0.13), 18))
    for colour, radius, shift in (("#f4f0e4", 0.066, 0.0), ("#141216", 0.054, 0.0), ("#ffffff", 0.02, 0.02)):
        paint(colour, _oval((head[0] + 0.1 + shift, head[1] - 0.03 - shift), (radius, radius), 0))

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
    bark, slope = draw.choice(["#6c5440", "#8c7660", "#54483c", "#7c8078"]), draw.uniform(-0.25, 0.25)
    thick = scale * draw.uniform(0.07, 0.16)
    far = [(foot[0] + step, foot[1] + thick / 3 + step * slope) for step in (-9 * scale, 9 * scale)]
    pen.line(far, fill=bark, width=round(thick))
    leaf = draw.choice(["#5c9440", "#84b04c", "#c4883c"])
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
    return tuple(min(max(round(int(colour[i : i + 2], 16) + by), 0), 255) for i in (1, 3, 5))
