"""Name the species in any photographs, into a .csv, .jsonl or .parquet file."""

import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vit_nabirds.errors import ConfigError, UserError

log = logging.getLogger("vit_nabirds")

REQUIRED = ("images", "out")
FLAGS = {
    "workdir": (str, "Folder of the run whose best checkpoint to use."),
    "step": (int, "Step of the run's checkpoint (default: the best)."),
    "model": (str, "Instead of a run: an exported folder, or another checkpoint's folder or Hub id."),
    "images": (str, "Photograph, or folder of photographs."),
    "out": (str, "File to write, .csv, .jsonl or .parquet: a row for each photograph and rank."),
    "topk": (5, "Species to name for each photograph."),
}
PARALLEL = False
CONFIGURED = False
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
COLUMNS = ("file", "rank", "species", "probability", "problem")


def run(options, group) -> int:
    if (options.workdir is None) == (options.model is None):
        raise ConfigError("predict needs --workdir or --model, not both")
    if options.topk < 1:
        raise ConfigError(f"--topk is {options.topk}: ask for at least one species")
    source = dict(workdir=options.workdir, step=options.step, model=options.model)
    return predict(Path(options.images), Path(options.out), options.topk, **source)


def predict(images: Path, out: Path, topk: int = 5, **source) -> int:
    """Write a row for each photograph and rank to `out`, completely or not at all; returns the exit code.

    `source` are the arguments of `Classifier`.
    """
    check_output(out)
    files = find_images(images)
    import cv2
    from tqdm import tqdm

    from vit_nabirds.evaluation.classifier import Classifier

    classifier = Classifier(**source)
    cv2.setNumThreads(1)  # one reading thread runs on each core already
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as unfinished:
        rows = Path(unfinished) / "rows"
        answers = tqdm(classifier(files, topk), total=len(files), unit=" images", disable=None)
        problems = write_rows(answers, rows)
        finished = rows if out.suffix == ".jsonl" else write_table(rows, out.suffix)
        finished.replace(out)
    log.info("%s: %d photographs, at most %d species for each", out, len(files) - problems, topk)
    if problems:
        log.warning("%d of %d files cannot be read: the column 'problem' of %s says why", problems, len(files), out)
    return 1 if problems == len(files) else 0


def check_output(out: Path) -> None:
    if out.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ConfigError(f"--out={out}: its name must end in .csv, .jsonl or .parquet.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out={out}: there is no folder {out.absolute().parent}.")
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder: give the name of a file.")


def find_images(path: Path) -> list[Path]:
    """The file, or all images in the folder and those below, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--images={path}: there is no such file or folder.")
    files = sorted(file for file in path.rglob("*") if file.is_file() or file.is_symlink() and not file.exists())
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise UserError(f"--images={path}: none of its {len(files)} files ends in {', '.join(SUFFIXES)}.")
    if others := len(files) - len(images):
        log.info("%s: %d files of other kinds are left out", path, others)
    return images


def write_rows(answers: Iterable[dict], file: Path) -> int:
    """Write answers of a `Classifier` as JSON lines; returns how many files could not be read."""
    problems = 0
    with file.open("w") as opened:
        for answer in answers:
            row = {"file": os.fsencode(answer["file"]).decode(errors="replace")}
            rows = [row | {"problem": answer["problem"]}] if answer["problem"] else []
            for rank, (species, probability) in enumerate(zip(answer["species"], answer["probability"], strict=True)):
                rows.append(row | {"rank": rank + 1, "species": species, "probability": probability})
            opened.writelines(json.dumps(dict.fromkeys(COLUMNS) | row) + "\n" for row in rows)
            problems += bool(answer["problem"])
    return problems


def write_table(rows: Path, suffix: str) -> Path:
    """JSON lines -> a .csv or .parquet file beside them."""
    import polars as pl

    types = (pl.String, pl.Int32, pl.String, pl.Float32, pl.String)
    table = pl.scan_ndjson(rows, schema=dict(zip(COLUMNS, types, strict=True)))
    file = rows.with_name("table")
    table.sink_csv(file) if suffix == ".csv" else table.sink_parquet(file)
    return file
