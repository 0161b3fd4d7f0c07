"""Name the species in any photographs, into a .csv, .jsonl or .parquet file, or a page to look at (--html)."""

import collections
import json
import logging
import math
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from vit_nabirds.commands.files import check_file
from vit_nabirds.data.kinds import HEADER, kind_of
from vit_nabirds.errors import ConfigError, UserError, quoted

log = logging.getLogger("vit_nabirds")

REQUIRED = ("images",)
FLAGS = {
    "workdir": (str, "Folder of the run whose selected checkpoint to use."),
    "step": (int, "Step of the run's checkpoint (default: the selected one)."),
    "views": (str, "Of each photograph for a run: one, flip or ten (default: as in its training)."),
    "model": (str, "Instead of a run: an exported folder, or another checkpoint's folder or Hub id."),
    "images": (str, "Photograph, or folder of photographs, whose links to folders are followed."),
    "boxes": (
        str,
        "File with boxes, to crop to each: bounding_boxes.txt, .csv, or .json of COCO or MegaDetector (animals of "
        "confidence 0.2 or more).",
    ),
    "out": (
        str,
        "File to write, .csv (a single quote stands before what a spreadsheet would run), .jsonl or .parquet: a row "
        "for each photograph (with --boxes: box) and rank.",
    ),
    "html": (str, "Page to write, beside or instead of --out: the photographs, each with its likeliest species."),
    "topk": (5, "Species to name for each photograph or box."),
    "max_pixels": (500_000_000, "Largest photograph to decode, in pixels."),
}
PARALLEL = False
CONFIGURED = ""
# Names that are always worth a row, if only to say why a file cannot be read.
SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .bmp .dib .tif .tiff .gif .avif .heic .heif .hif .jp2 .j2k .jpx "
    ".pbm .pgm .ppm .pnm"
).split()
# Cameras' raw files begin like TIFF, but all that is picture in them without a raw converter is a thumbnail.
RAW = ".3fr .arw .cr2 .dcr .dng .erf .iiq .kdc .nef .nrw .pef .sr2 .srw".split()
COLUMNS = ("file", "box", "rank", "species", "probability", "problem")


def run(options, group) -> int:
    if (options.workdir is None) == (options.model is None):
        raise ConfigError("predict needs --workdir or --model, not both")
    if options.model is not None and (given := [x for x in ("step", "views") if options[x].value is not None]):
        raise ConfigError(f"--{given[0]} is for --workdir: what --model names is one checkpoint, shown one view.")
    for flag, what in {"topk": "species", "max_pixels": "pixel"}.items():
        if options[flag].value < 1:
            raise ConfigError(f"--{flag} is {options[flag].value}: ask for at least one {what}")
    source = {name: options[name].value for name in ("workdir", "step", "views", "model", "max_pixels")}
    out, html, boxes = (options[name].value and Path(options[name].value) for name in ("out", "html", "boxes"))
    if not out and not html:
        raise ConfigError("predict needs --out or --html, or both")
    return predict(Path(options.images), out, options.topk, boxes, html, **source)


def predict(
    images: Path, out: Path | None, topk: int = 5, boxes: Path | None = None, html: Path | None = None, **source
) -> int:
    """Write a row for each photograph, or each of its boxes in the file `boxes`, and rank to `out`, and a page `html`,
    each completely or not at all; returns the exit code. A call that was stopped goes on when it is made again.

    `source` are the arguments of `Classifier`.
    """
    if out:
        check_file("out", out, (".csv", ".jsonl", ".parquet"))
    if html:
        check_file("html", html, (".html",))
    files = find_images(images)
    import cv2

    from vit_nabirds.data.boxes import BoxFinder
    from vit_nabirds.evaluation.classifier import Classifier
    from vit_nabirds.evaluation.kept import Kept, version_of
    from vit_nabirds.terminal import progress

    find = boxes and BoxFinder(boxes, files, images if images.is_dir() else images.parent)
    classifier = Classifier(**source)
    cv2.setNumThreads(1)  # one reading thread runs on each core already
    first, unit = out or html, "boxes" if find else "photographs"
    question = {"model": classifier.fingerprint, "topk": topk, "thumbnails": html is not None}
    question |= {"boxes": boxes and version_of(boxes), "max_pixels": source.get("max_pixels")}
    with Kept(first.with_name(f".{first.name}.answers"), question) as kept:
        done, before = kept.resume(files)
        if done:
            log.info("%d of %d photographs were answered before: going on", done, len(files))
        answers = classifier(files[done:], topk, find, thumbnails=html is not None)
        total = len(find or files)
        for answer in progress(answers, total, unit, done=before):
            kept.add(answer)
        named, problems = write_answers(kept, out, html, images)
        kept.remove()
    log.info(
        "%s: %d %s, at most %d species for each", " and ".join(map(str, filter(None, [out, html]))), named, unit, topk
    )
    if find:
        for note, count in find.notes().items():
            if count:
                log.warning("%s: %d %s", boxes, count, note)
    if problems:
        says = f"the column 'problem' of {out}" if out else html
        log.warning("%d of %d have no species: %s says why", problems, named + problems, says)
    return 0 if named else 1


def write_answers(answers: Iterable[dict], out: Path | None, html: Path | None, images: Path) -> tuple[int, int]:
    """Write what is asked for of the answers, which can be iterated over again and again; returns how many name
    species, and how many a problem."""
    first = out or html
    with tempfile.TemporaryDirectory(prefix=f".{first.name}.", dir=first.absolute().parent) as unfinished:
        rows = Path(unfinished) / "rows"
        named, problems = write_rows(answers, rows)
        if out:
            finished = rows if out.suffix == ".jsonl" else write_table(rows, out.suffix)
        if html:
            write_sheet(answers, html, images, named, problems)
        if out:
            finished.replace(out)
    return named, problems


def write_sheet(answers: Iterable[dict], html: Path, images: Path, named: int, problems: int) -> None:
    """The page. Photographers are named where the photographs lie in an archive or a prepared folder that does."""
    from vit_nabirds.data.photographers import photographers_of
    from vit_nabirds.evaluation.pages import write_page

    photographers = photographers_of(images)
    folder = images if images.is_dir() else images.parent
    shown = (
        answer
        | {"name": os.path.relpath(answer["file"], folder), "by": photographers.get(os.path.abspath(answer["file"]))}
        for answer in answers
    )
    write_page(html, "sheet.html", sorts=False, answers=shown, images=images, named=named, problems=problems)


def find_images(path: Path) -> list[Path]:
    """The file, or all pictures in the folder and those below, by name, and what cannot be opened to see what it is."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--images={path}: there is no such file or folder.")
    images, others = [], collections.Counter()
    for file in sorted(walk(path)):
        if other := other_kind(file):
            others[other] += 1
        else:
            images.append(file)
    kinds = ", ".join(f"{count:,} {quoted(kind, 40)}" for kind, count in others.most_common(20))
    kinds += f" and {len(others) - 20:,} other kinds" * (len(others) > 20)
    if not images:
        raise UserError(f"--images={path}: there is no picture in it ({kinds or 'no file at all'}).")
    if kinds:
        log.info("%s: %s left out", path, kinds)
    return images


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and every folder that cannot be listed. Each folder comes once, whatever links to it:
    under its own path if that lies below `folder`."""
    seen, links, unreadable = set(), collections.deque([folder]), []
    while links:
        for parent, folders, files in os.walk(links.popleft(), onerror=lambda error: unreadable.append(error.filename)):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()
            links.extend(link for name in folders if (link := Path(parent, name)).is_symlink())
            yield from (Path(parent, name) for name in files)
    yield from map(Path, unreadable)


def other_kind(file: Path) -> str:
    """What a file is, if it is no picture by its name or content. What cannot be opened may be one, to be reported."""
    named = file.suffix.lower() in SUFFIXES and not file.name.startswith("._")  # macOS's companions of files
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return "pipes or devices"  # to open one may take forever
        if not named and file.suffix.lower() not in RAW:
            with file.open("rb") as opened:
                named = kind_of(opened.read(HEADER))
    except OSError:
        return ""
    except ValueError:
        named = False
    if named:
        return ""
    if file.name.startswith("._"):
        return "._*"
    return file.suffix.lower() or (file.name if file.name.startswith(".") else "without a suffix")


def write_rows(answers: Iterable[dict], file: Path) -> tuple[int, int]:
    """Write answers of a `Classifier` as JSON lines; returns how many name species, and how many a problem."""
    named = problems = 0
    with file.open("w") as opened:
        for answer in answers:
            row = {"file": os.fsencode(answer["file"]).decode(errors="replace")}
            if answer["box"]:
                row["box"] = " ".join(str(round(side)) for side in answer["box"])
            rows = [row | {"problem": answer["problem"]}] if answer["problem"] else []
            for rank, (species, probability) in enumerate(zip(answer["species"], answer["probability"], strict=True)):
                probability = probability if math.isfinite(probability) else None  # JSON has no NaN
                rows.append(row | {"rank": rank + 1, "species": species, "probability": probability})
            opened.writelines(json.dumps(dict.fromkeys(COLUMNS) | row) + "\n" for row in rows)
            named, problems = named + (not answer["problem"]), problems + bool(answer["problem"])
    return named, problems


def write_table(rows: Path, suffix: str) -> Path:
    """JSON lines -> a .csv or .parquet file beside them. In a .csv, a single quote stands before text that a
    spreadsheet would take for a formula."""
    import polars as pl

    from vit_nabirds.data.foreign import without_formulas

    types = (pl.String, pl.String, pl.Int32, pl.String, pl.Float32, pl.String)
    table = pl.scan_ndjson(rows, schema=dict(zip(COLUMNS, types, strict=True)))
    file = rows.with_name("table")
    if suffix == ".csv":
        table.with_columns(without_formulas(pl.col("file", "species", "problem"))).sink_csv(file)
    else:
        table.sink_parquet(file)
    return file
