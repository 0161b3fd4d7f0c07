"""Files that nobody has made in good faith: a message or a valid result, never another error, a hang or much memory.

FUZZ_CASES sets the cases of each test. What a long run has found is kept as an example in test_strangers.py.
"""

import contextlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_nabirds.commands.predict import COLUMNS, write_rows, write_table
from vit_nabirds.data import pictures
from vit_nabirds.data.archives import read_archive
from vit_nabirds.data.boxes import read_boxes
from vit_nabirds.data.foreign import without_formulas
from vit_nabirds.data.pack import pack
from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.pictures import open_picture
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.table import left_out_of, read_table, settings_of
from vit_nabirds.data.taxonomy import read_taxonomy
from vit_nabirds.errors import UserError, quoted

CASES = int(os.environ.get("FUZZ_CASES", "150"))
SECONDS = 60  # for a case, which takes milliseconds where nothing else runs
fuzz = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

# Text that means something to one of the parsers.
EVIL = st.sampled_from(
    "|0|1|-1|-0|٣49|１２|1_000|+5|1e400|-1e400|1e308|nan|inf|-inf|0x10|1.|.5|1e5|99999999999|999999999|null|None|true|"
    "../../etc/passwd|/etc/passwd|a/../b|./a|a//b|a\\b|a/|.|..|~|C:\\a|a\0b|\0|\ufeff|\u202e|\x1b[31m|\u200b|a b|é|"
    '=cmd()|@SUM(A1)|+1|-1|\t|\r|\n|\r\n|\x85|\u2028|\x0b|"|\'|""|,|;|{|}|{row}|{0}|%s|%|//|row|file|blank|name|path|'
    "label|split|train|test|val|images|species|\U0010ffff|(|()|Teal (Male)|(Male)".split("|")
    + ["x" * 300, "9" * 400, "a/" * 300 + "b", "x" * 5000]
)
TEXT = st.one_of(EVIL, EVIL, EVIL, st.text(max_size=8), st.integers().map(str), st.floats().map(str))
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), TEXT,
        st.sampled_from([10**30, -(10**30), 10**400, 2**63, 1e308, float("nan"), float("inf"), "\ud800", {}, []]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SEED = st.integers(0, 2**32 - 1)


class Hang(BaseException):
    pass


def on_alarm(*_):
    raise Hang


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """Two GiB more than the process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, hard))
    handler = signal.signal(signal.SIGALRM, on_alarm)
    yield
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def survives(call, *arguments, errors=(UserError,), **options):
    """The result of a call, or None after one of the errors, whose message must be fit to be shown."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return call(*arguments, **options)
    except errors as error:
        message = str(error)
        assert message and len(message) < 4000
        assert isinstance(error, OSError) or all(char.isprintable() or char in "\n" for char in message)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert time.monotonic() - started < SECONDS


@pytest.fixture(scope="module")
def place():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def emptied(folder: Path) -> Path:
    """A folder with a name of its own: what is known of another one must not be taken for it."""
    for old in folder.iterdir():
        shutil.rmtree(old)
    return Path(tempfile.mkdtemp(dir=folder))


def changed_bytes(data: bytes, seed: int) -> bytes:
    """With a few bytes changed, cut out, repeated or put in; or of another length."""
    draw, data = random.Random(seed), bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.6 else draw.randrange(min(len(data), 300) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 40))
        match draw.randrange(7):
            case 0 | 1:
                data[at : at + length] = draw.randbytes(length)
            case 2:
                data[at : at + length] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
            case 5:
                data[at : at + 1] = bytes([data[at] ^ 1 << draw.randrange(8)]) if at < len(data) else b""
            case 6:
                if draw.random() < 0.3:
                    del data[at:]
                else:
                    data[at:at] = draw.randbytes(length)
    return bytes(data)


@st.composite
def changed_text(draw, text: str, separators: str = " ") -> bytes:
    """With some fields, lines or characters changed."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.integers(0, len(lines) - 1))
        match draw(st.integers(0, 7)):
            case 0 | 1 | 2 | 3:
                separator = draw(st.sampled_from(separators))
                fields = lines[row].split(separator)
                fields[draw(st.integers(0, len(fields) - 1))] = draw(TEXT)
                lines[row] = separator.join(fields)
            case 4:
                lines[row] = draw(TEXT)
            case 5:
                lines.insert(row, draw(st.sampled_from(lines)))
            case 6:
                del lines[row]
                lines = lines or [""]
            case 7:
                lines[row] += draw(TEXT)
    text = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"])).join(lines)
    data = draw(st.sampled_from(["", "", "\ufeff"])).encode() + text.encode(errors="surrogatepass")
    return changed_bytes(data, draw(SEED)) if draw(st.integers(0, 9)) == 0 else data


@st.composite
def changed_json(draw, content: object) -> bytes:
    """With other values, or other keys, in some places; or changed as text."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(0, 2))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.integers(0, 5)):
                node = node[key]
                continue
            if isinstance(node, dict) and not draw(st.integers(0, 4)):
                del node[key]
            else:
                node[key] = draw(JSON)
            break
    data = json.dumps(content).encode()
    if not draw(st.integers(0, 9)):
        data = changed_bytes(data, draw(SEED))
    return b"[" * 100_000 if not draw(st.integers(0, 99)) else data


def check_archive(archive) -> None:
    """An archive that was accepted is one that can be prepared."""
    if archive is None:
        return
    table = archive.table
    assert table["path"].n_unique() == table.height > 0
    for name in ("path", "source"):
        assert not table[name].str.contains(r"^/|(^|/)\.\.?(/|$)|\x00").any()
    assert table["subcategory"].str.len_chars().min() > 0 and table["is_training_img"].n_unique() == 2
    boxes = table.select("bb_x", "bb_y", "bb_width", "bb_height").drop_nulls()
    assert all(math.isfinite(number) and abs(number) <= 2e9 for row in boxes.rows() for number in row)
    assert boxes["bb_width"].len() == 0 or min(boxes["bb_width"].min(), boxes["bb_height"].min()) > 0


NABIRDS = {
    "images": "u-1 0318/u1.jpg\nu-2 0318/u2.JPG\nu-3 0617/u3.jpg\nu-4 0955/u 4.jpg\n",
    "image_class_labels": "u-1 318\nu-2 318\nu-3 617\nu-4 955\n",
    "bounding_boxes": "u-1 1 2 30 40\nu-2 0 0 100 80\nu-3 5 5 20 20\nu-4 90 70 20 20\n",
    "sizes": "u-1 100 80\nu-2 100 80\nu-3 100 80\nu-4 100 80\n",
    "photographers": "u-1 Ada\nu-2 Bo B\nu-3 Ada\nu-4 Çim\n",
    "train_test_split": "u-1 1\nu-2 0\nu-3 1\nu-4 0\n",
    "classes": "0 Birds\n1 Ducks, Geese\n318 Teal (Male)\n617 Wren\n955 Tit\n",
    "hierarchy": "1 0\n318 1\n617 0\n955 0\n",
}
CUB = {name: NABIRDS[name] for name in ("image_class_labels", "bounding_boxes", "train_test_split", "classes")}
CUB["images"] = NABIRDS["images"]
CUB = {name: text.replace("u-", "") for name, text in CUB.items()}
TABLE = (
    "path,label,split,bb_x,bb_y,bb_width,bb_height,width,height,photographer\na.jpg,Teal,train,1,2,30,40,100,80,Ada\n"
    'b.jpg,"Wren, x",train,,,,,,,\nc.jpg,Teal,test,5,5.5,9,9,100,80,Bo\nsub/d.jpg,Wren,test,1,1,9,9,,,\n'
)
CORNERS = "file;class;xmin;ymin;xmax;ymax\na.jpg;Teal;1;2;30;40\nb.jpg;Wren;1;1;9;9\nc.jpg;Teal;3;3;9;9\n"
COCO = {
    "images": [
        {"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80, "rights_holder": "Ada"} for n in range(1, 5)
    ],
    "annotations": [
        {"image_id": n, "category_id": 7 + n % 2, "bbox": [1.5, 2, 30, 40], "iscrowd": 0} for n in range(1, 5)
    ],
    "categories": [
        {"id": 7, "name": "Teal", "supercategory": "Ducks", "order": "A"},
        {"id": 8, "name": "Wren", "supercategory": "Songbirds", "genus": "B"},
    ],
}
DETECTED = {
    "detection_categories": {"1": "animal", "2": "person"},
    "images": [
        {"file": "a.jpg", "detections": [{"category": "1", "conf": 0.9, "bbox": [0.1, 0.2, 0.3, 0.4]}]},
        {"file": "b.jpg", "detections": None, "failure": "broken"},
    ],
}


@fuzz
@given(st.data())
def test_text_files(place, data):
    folder = emptied(place)
    texts = data.draw(st.sampled_from([NABIRDS, NABIRDS, CUB]))
    chosen = data.draw(st.sampled_from(sorted(texts)))
    for name, text in texts.items():
        content = data.draw(changed_text(text)) if name == chosen else text.encode()
        (folder / f"{name}.txt").write_bytes(content)
    check_archive(survives(read_archive, folder, data.draw(st.sampled_from(["box", "none"]))))


@fuzz
@given(st.data())
def test_csv_tables(place, data):
    folder = emptied(place)
    text, share = data.draw(st.sampled_from([(TABLE, None), (CORNERS, 0.5)]))
    file = folder / "birds.csv"
    file.write_bytes(data.draw(changed_text(text, ",;")))
    named = data.draw(st.sampled_from([folder, file]))
    check_archive(survives(read_archive, named, data.draw(st.sampled_from(["box", "none"])), share))


VALUES = {
    pl.String: TEXT, pl.Int64: st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 200), pl.Float64: st.floats(),
    pl.Boolean: st.booleans(), pl.Binary: st.binary(max_size=5), pl.List(pl.String): st.lists(TEXT, max_size=2),
    pl.UInt8: st.integers(0, 255), pl.Int8: st.integers(-128, 127), pl.Date: st.dates(), pl.Datetime: st.datetimes(),
    pl.Duration: st.timedeltas(), pl.Time: st.times(), pl.Null: st.none(), pl.Categorical: TEXT, pl.UInt32: SEED,
    pl.Struct({"a": pl.String}): st.fixed_dictionaries({"a": TEXT}), pl.Decimal(10, 2): st.integers(-99, 99),
    pl.Enum(["train", "test"]): st.sampled_from(["train", "test"]), pl.Float32: st.floats(width=32),
    pl.Array(pl.Int8, 2): st.lists(st.integers(0, 9), min_size=2, max_size=2),
}  # fmt: skip


@st.composite
def changed_frame(draw, frame: pl.DataFrame) -> bytes:
    """As Parquet, with some columns of other types, values or names; or with changed bytes."""
    columns = {name: frame[name] for name in frame.columns}
    for _ in range(draw(st.integers(0, 3))):
        name, act = draw(st.sampled_from(sorted(columns))), draw(st.integers(0, 4))
        if act == 0 and len(columns) > 1:
            del columns[name]
        elif act == 1:
            columns[draw(TEXT)] = columns.pop(name)
        elif act == 2:
            values = columns[name].to_list()
            values[draw(st.integers(0, len(values) - 1))] = draw(st.none() | VALUES.get(columns[name].dtype, st.none()))
            columns[name] = pl.Series(values, dtype=columns[name].dtype, strict=False)
        else:
            dtype = draw(st.sampled_from(list(VALUES)))
            values = draw(st.lists(st.none() | VALUES[dtype], min_size=frame.height, max_size=frame.height))
            columns[name if act == 3 else draw(TEXT)] = pl.Series(values, dtype=dtype, strict=False)
    frame = pl.DataFrame([series.alias(name) for name, series in columns.items()])
    frame = frame.head(draw(st.sampled_from([frame.height, frame.height, 1, 0])))
    frame.write_parquet(buffer := io.BytesIO(), metadata={"skipped": draw(TEXT)})
    return changed_bytes(buffer.getvalue(), draw(SEED)) if not draw(st.integers(0, 4)) else buffer.getvalue()


@fuzz
@given(st.data())
def test_parquet_tables(place, data):
    folder = emptied(place)
    frame = pl.read_csv(TABLE.encode())
    (folder / "birds.parquet").write_bytes(data.draw(changed_frame(frame)))
    check_archive(survives(read_archive, folder))


@fuzz
@given(st.data())
def test_coco(place, data):
    folder = emptied(place)
    file = folder / "labels.json"
    file.write_bytes(data.draw(changed_json(COCO)))
    check_archive(survives(read_archive, file, data.draw(st.sampled_from(["box", "none"])), test_share=0.5))


@fuzz
@given(st.data())
def test_coco_with_a_file_for_each_split(place, data):
    folder = emptied(place)
    for split in ("train", "test"):
        (folder / f"{split}.json").write_bytes(data.draw(changed_json(COCO)))
    check_archive(survives(read_archive, folder))


NAME = st.one_of(st.sampled_from(["train", "test", "val", "Teal", "Wren", "a.jpg", "b.jpg", "images"]), TEXT)
NAME = NAME.filter(lambda name: name not in ("", ".", "..") and not set(name) & {"/", "\0"})
NAME = NAME.map(lambda name: name.encode(errors="ignore")[:250]) | st.just(b"caf\xe9")


@fuzz
@given(st.lists(st.tuples(st.lists(NAME, min_size=1, max_size=4), st.integers(0, 9)), max_size=8))
def test_folders(place, entries):
    folder = emptied(place)
    for names, kind in [([b"train", b"Teal", b"1.jpg"], 9), ([b"test", b"Wren", b"2.jpg"], 9), *entries]:
        path = os.path.join(os.fsencode(folder), *filter(None, names))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if kind == 0:
                os.mkfifo(path)
            elif kind == 1:
                os.symlink(os.fsencode(folder), path)
            elif kind == 2:
                os.symlink(b"/dev/zero", path)
            elif kind == 3:
                os.makedirs(path)
            else:
                with open(path, "xb"):
                    pass
        except (OSError, ValueError):
            continue
    check_archive(survives(read_archive, folder))


@fuzz
@given(st.data())
def test_boxes(place, data):
    folder, kind = emptied(place), data.draw(st.integers(0, 4))
    file = folder / ("bounding_boxes.txt", "b.csv", "b.tsv", "b.json", "b.json")[kind]
    if kind == 0:
        chosen = data.draw(st.sampled_from(["images", "sizes", "bounding_boxes"]))
        for name in ("images", "sizes", "bounding_boxes"):
            text = NABIRDS[name]
            (folder / f"{name}.txt").write_bytes(data.draw(changed_text(text)) if name == chosen else text.encode())
    elif kind < 3:
        text = data.draw(st.sampled_from([TABLE, CORNERS]))
        file.write_bytes(data.draw(changed_text(text, ",;")))
    else:
        file.write_bytes(data.draw(changed_json(COCO if kind == 3 else DETECTED)))
    for stated in (survives(read_boxes, file) or {}).values():
        if isinstance(stated, str):
            assert len(stated) < 300
            continue
        for one in stated:
            assert one.box is None or all(math.isfinite(number) and abs(number) < 2e9 for number in one.box)
            assert one.sizes is None or 0 < min(one.sizes)


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small packed folder, by path."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for name, text in NABIRDS.items():
        (folder / f"{name}.txt").write_text(text)
    for number, row in enumerate(NABIRDS["images"].splitlines()):
        file = folder / "images" / row.split(maxsplit=1)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80), (number * 50, 99, 200)).save(file, "JPEG")
    prepare(folder, folder / "out", train_size=20, test_size=16, pack=True)
    files = (file for file in (folder / "out").rglob("*") if file.is_file())
    return {str(file.relative_to(folder / "out")): file.read_bytes() for file in files}


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def use(root: Path, label: str = "species", validation: float = 0) -> None:
    """What a training does with a prepared folder."""
    table = read_table(root, label, validation)
    labels = table["label"]
    assert sorted(set(labels)) == list(range(labels.n_unique()))
    assert left_out_of(root) >= 0
    settings_of(root).get("crop")
    taxonomy = read_taxonomy(root, table)
    assert taxonomy is None or len(taxonomy.ancestors) == len(taxonomy.depths) == labels.n_unique()
    for split in ("train", "validation", "test"):
        chosen = table.with_columns(split=pl.lit(split)) if split == "validation" else table
        photographs = survives(open_split, root, chosen, split)
        for index in range(len(photographs or ())):
            survives(photographs.read, index, np.empty((photographs.size, photographs.size, 3), np.uint8))


@fuzz
@given(st.data())
def test_a_prepared_folder(place, birds, data):
    part = data.draw(st.sampled_from(["metadata.parquet", "prepared.json", "hierarchy.txt", "classes.txt", "image"]))
    files = {name: content for name, content in birds.items() if not name.startswith("packed")}
    if part == "metadata.parquet":
        files[part] = data.draw(changed_frame(pl.read_parquet(birds[part])))
    elif part == "prepared.json":
        files[part] = data.draw(changed_json(json.loads(birds[part])))
    elif part == "image":
        part = data.draw(st.sampled_from(sorted(name for name in files if name.startswith("cleaned"))))
        files[part] = changed_bytes(files[part], data.draw(SEED))
    else:
        files[part] = data.draw(changed_text(files[part].decode()))
    how = data.draw(st.sampled_from([("species", 0), ("species", 0), ("category", 0), ("species", 0.5)]))
    survives(use, lay_out(emptied(place), files), *how)


@fuzz
@given(st.data())
def test_a_pack(place, birds, data):
    part = data.draw(st.sampled_from(["train.npy", "train.npy", "test.npy", "index.parquet"]))
    files, name = dict(birds), f"packed/{part}"
    if part == "index.parquet":
        files[name] = data.draw(changed_frame(pl.read_parquet(birds[name])))
    elif data.draw(st.booleans()):
        files[name] = changed_bytes(birds[name][:128], data.draw(SEED)) + birds[name][128:]
    else:
        shape = data.draw(
            st.sampled_from(["(2, 20, 20, 3)", "(2, 20, 20, 3, )", "(9**9**9, 20, 20, 3)", "(" * 90]) | TEXT
        )
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        files[name] = b"\x93NUMPY\1\0" + struct.pack("<H", len(header) % 2**16) + header + birds[name][128:]
    root = lay_out(emptied(place), files)
    survives(use, root)
    if not data.draw(st.integers(0, 19)):
        survives(pack, root)


@fuzz
@given(st.data())
def test_preparing_again_into_a_strangers_folder(place, birds, data):
    folder = emptied(place)
    files = {name: content for name, content in birds.items() if not name.startswith("packed")}
    part = data.draw(st.sampled_from(["metadata.parquet", "prepared.json", "skipped.csv"]))
    if part == "skipped.csv":
        files[part] = data.draw(changed_text("source,reason\na.jpg,broken\n", ","))
    else:
        files[part] = changed_bytes(birds[part], data.draw(SEED))
    lay_out(folder / "out", files)
    lay_out(folder / "data", {f"{name}.txt": text.encode() for name, text in NABIRDS.items()})
    for row in NABIRDS["images"].splitlines():
        picture = changed_bytes(PICTURES["JPEG"], data.draw(SEED)) if data.draw(st.booleans()) else PICTURES["JPEG"]
        lay_out(folder / "data" / "images", {row.split(maxsplit=1)[1]: picture})
    options = dict(train_size=20, test_size=16, on_error="skip", max_skipped=1)
    survives(prepare, folder / "data", folder / "out", **options)


def saved(kind: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(pixels, 2, 0), 2, 1)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


MORE = [Image.new("RGB", (82, 60), "red"), Image.new("RGB", (82, 60), "blue")]
PICTURES = {
    "JPEG": saved("JPEG", exif=exif(6)), "JPEG, progressive": saved("JPEG", progressive=True, exif=exif(3)),
    "JPEG, grey": saved("JPEG", "L"), "JPEG, CMYK": saved("JPEG", "CMYK"),
    "PNG": saved("PNG", exif=exif(8)), "PNG, palette": saved("PNG", "P"), "PNG, alpha": saved("PNG", "RGBA"),
    "GIF": saved("GIF"), "GIF, animated": saved("GIF", save_all=True, append_images=MORE),
    "WEBP": saved("WEBP", exif=exif(5)), "WEBP, lossless": saved("WEBP", lossless=True),
    "WEBP, animated": saved("WEBP", save_all=True, append_images=MORE),
    "TIFF": saved("TIFF", exif=exif(7)), "TIFF, LZW": saved("TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": saved("TIFF", compression="jpeg"), "TIFF, deflate": saved("TIFF", compression="tiff_adobe_deflate"),
    "TIFF, pages": saved("TIFF", save_all=True, append_images=MORE),
    "BMP": saved("BMP"), "BMP, palette": saved("BMP", "P"), "PPM": saved("PPM"), "PGM": saved("PPM", "L"),
    "JPEG2000": saved("JPEG2000"), "AVIF": saved("AVIF"),
}  # fmt: skip


def see(data: bytes, scale: float) -> None:
    picture = open_picture(data, max_pixels=2**20)
    pixels = picture.read(scale)
    assert picture.orientation in range(1, 9)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    if scale == 1:
        assert pixels.shape[1::-1] == picture.size


@pytest.mark.parametrize("kind", PICTURES)
@settings(fuzz, max_examples=max(CASES // 3, 1))
@given(seed=SEED, scale=st.sampled_from([1, 1, 0.3]))
def test_changed_pictures(kind, seed, scale):
    survives(see, changed_bytes(PICTURES[kind], seed), scale, errors=(ValueError, OSError))


@fuzz
@given(st.sampled_from(sorted(PICTURES)), st.integers(0, 64), st.binary(max_size=200))
def test_rubbish_behind_the_start_of_a_picture(kind, length, rubbish):
    survives(see, PICTURES[kind][:length] + rubbish, 1, errors=(ValueError, OSError))


@fuzz
@given(SEED, st.integers(0, 5))
def test_png_chunks_with_right_checksums(seed, chosen):
    """What a decompressor gets if only its checksum stands before it."""
    data, parts, position = PICTURES["PNG"], [PICTURES["PNG"][:8]], 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        content = data[position + 4 : position + 8 + length]
        if len(parts) - 1 == chosen:
            content = content[:4] + changed_bytes(content[4:], seed)
        parts.append(struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content)))
        position += 12 + length
    survives(see, b"".join(parts), 1, errors=(ValueError, OSError))


@fuzz
@given(st.sampled_from([exif(6), b"Exif\0\0" + exif(6), b"MM\0*\0\0\0\x08"]), SEED, st.binary(max_size=40))
def test_exif(start, seed, end):
    for content in (changed_bytes(start, seed), start + end, changed_bytes(start, seed)[:64] + end):
        assert survives(pictures._orientation_in, content) in (None, *range(1, 9))
        plain = saved_without_exif[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
        survives(see, plain + saved_without_exif[2:], 1, errors=(ValueError,))


saved_without_exif = saved("JPEG")


@fuzz
@given(st.text(st.characters(), max_size=300), st.integers(1, 300))
def test_quoted_text_is_short_and_printable(text, most):
    shown = quoted(text, most)
    assert len(shown) <= most and shown.isprintable()
    shown.encode()
    assert not text.isascii() or not text.isprintable() or len(text) > most or shown == text


@fuzz
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
def test_predictions_of_strange_files(place, texts):
    """In a spreadsheet no cell is a formula; in Parquet every text is what it was."""
    folder = emptied(place)
    answers = [
        {"file": file, "box": None, "species": [species], "probability": [0.5], "problem": None}
        for file, species, _ in texts
    ]
    answers += [
        {"file": "a", "box": None, "species": [], "probability": [], "problem": problem} for *_, problem in texts
    ]
    write_rows(answers, folder / "rows")
    table = pl.read_parquet(survives(write_table, folder / "rows", ".parquet"))
    assert table["species"].to_list()[: len(texts)] == [species for _, species, _ in texts]
    file = survives(write_table, folder / "rows", ".csv")
    read = pl.read_csv(file, infer_schema=False).fill_null("")
    assert tuple(read.columns) == COLUMNS
    for name in ("file", "species", "problem"):
        safe = table.select(without_formulas(pl.col(name)).fill_null(""))[name]
        assert read[name].to_list() == safe.to_list()
        assert not read[name].str.contains(r"^[=+\-@\t\r\n]").any()
