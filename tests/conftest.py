"""A tiny prepared folder of drawn birds, and tiny runs on it."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Two devices in every test; set before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests choose the size of their terminals; several test processes are given another.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)

# The same small programs are compiled for many tests and processes. Workers of pytest-xdist have the folder of the
# process that has started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vit-nabirds-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

REPOSITORY = Path(__file__).parent.parent
# Real photographs, weights and metadata, where there are some: tests that want them are skipped elsewhere.
SHARED = Path(os.environ.get("VIT_NABIRDS_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """48 train and 15 test images of 4 species, 20 and 16 px: 15 does not divide by the batch of 8."""
    from vit_nabirds.data.prepare import prepare
    from vit_nabirds.data.synthetic import draw_archive

    folder = tmp_path_factory.mktemp("birds")
    draw_archive(folder / "archive", species=4, train=12, test=4, size=(40, 60))
    drop_last_test_image(folder / "archive")
    prepare(folder / "archive", folder / "prepared", train_size=20, test_size=16)
    return folder / "prepared"


def drop_last_test_image(archive: Path) -> None:
    rows = (archive / "train_test_split.txt").read_text().splitlines()
    uuid = [row.split()[0] for row in rows if row.endswith(" 0")][-1]
    for name in ("images", "image_class_labels", "bounding_boxes", "sizes", "photographers", "train_test_split"):
        file = archive / f"{name}.txt"
        kept = [row for row in file.read_text().splitlines(keepends=True) if not row.startswith(uuid)]
        file.write_text("".join(kept))


@pytest.fixture
def tiny_config(prepared):
    """A run of 20 steps of 8 images with a ViT of two small blocks, on 40 images; 8 are held out."""
    from tiny_config import get_config

    config = get_config()
    config.data.root = str(prepared)
    return config


@pytest.fixture(scope="session")
def undisturbed(prepared, tmp_path_factory) -> Path:
    """The workdir of a whole run of 20 steps on two devices. Copy it to change it."""
    from tiny_config import get_config
    from tiny_runs import FINISHED, train

    config = get_config()
    config.data.root = str(prepared)
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert train(config, workdir) == FINISHED
    return workdir


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A checkpoint folder in PyTorch's naming, as the Hub holds them."""
    from checkpoints import save_tiny

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_tiny(folder)
    return folder


# `python main.py ...`, stopped or held when a line with the text of the second argument is logged.
AT = """
import sys
import tiny_runs
from vit_nabirds.cli import console
act, text, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
with tiny_runs.at(text, getattr(tiny_runs, act)):
    console()
"""


@pytest.fixture
def main(prepared, tmp_path):
    """Runs `python main.py ...` in a process of its own."""

    def environment(devices: int = 1) -> dict[str, str]:
        flags = f"--xla_force_host_platform_device_count={devices}"
        return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}

    def run(
        *arguments: str, devices: int = 1, stop_at: str = "", hold_at: str = "", start_only: bool = False, **options
    ):
        program = ["-c", AT, "terminate" if stop_at else "hold", stop_at or hold_at]
        if not (stop_at or hold_at):
            program = [REPOSITORY / "main.py"]
        command = [sys.executable, *map(str, [*program, *arguments])]
        options = dict(env=environment(devices), text=True, cwd=tmp_path) | options
        if start_only:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        return subprocess.run(command, capture_output=True, **options)

    run.tiny = [f"--config={REPOSITORY / 'tests' / 'tiny_config.py'}", f"--config.data.root={prepared}"]
    run.environment = environment
    return run
