"""Fuzz, guided by coverage, what reads strangers' bytes:  python -m tests.coverage_fuzz READER [libFuzzer options]

It needs atheris (`pip install atheris`), which is not installed with the tests. `-runs=50000` ends it, a folder's name
keeps what reached new code. The tests in test_fuzz_*.py need nothing of this.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vit_nabirds", "json", "csv", "PIL"]):
    from vit_nabirds.config.json_files import parse_object
    from vit_nabirds.data.boxes import read_boxes
    from vit_nabirds.data.pictures import open_picture
    from vit_nabirds.errors import UserError
    from vit_nabirds.models.pretrained.hf_config import architecture_of, read_config
    from vit_nabirds.models.pretrained.tensors import read_tensors
    from vit_nabirds.runs.metrics import split_metrics


def picture(data: bytes, _: Path) -> None:
    image = open_picture(data, max_pixels=2**18)
    assert image.read(1).shape[2] == 3


def boxes(data: bytes, folder: Path) -> None:
    for name in ("boxes.csv", "boxes.json", "bounding_boxes.txt"):
        (folder / name).write_bytes(data)
        try:
            read_boxes(folder / name)
        except UserError:
            continue


def weights(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    read_tensors(folder)


def architecture(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    architecture_of(read_config(folder))


def metrics(data: bytes, folder: Path) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    lines, damaged = split_metrics(folder / "metrics.jsonl")
    assert all(isinstance(line["step"], int) for line in lines)


READERS: dict[str, tuple[Callable[[bytes, Path], None], tuple[type[Exception], ...]]] = {
    "picture": (picture, (ValueError, OSError)),
    "json": (lambda data, _: parse_object(data), (ValueError,)),
    "boxes": (boxes, ()),
    "weights": (weights, (UserError,)),
    "architecture": (architecture, (UserError,)),
    "metrics": (metrics, ()),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: python -m tests.coverage_fuzz {{{','.join(READERS)}}} [-runs=N] [FOLDER]")
    read, allowed = READERS[sys.argv.pop(1)]
    folder = Path(tempfile.mkdtemp())

    def once(data: bytes) -> None:
        try:
            read(data, folder)
        except allowed:
            return

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
