"""docs/mistakes.md: every command there says what the page says, ends with that exit code, and writes nothing."""

import contextlib
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
from test_foreign_runs import edit_metadata
from tiny_runs import with_own_mounts

from vit_nabirds import cli
from vit_nabirds.commands.export import export

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "mistakes.md").read_text()


def rows() -> dict[str, tuple[str, int, str]]:
    """(command, exit code, message) by mistake, from the tables of the page."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[2].isdecimal():
            assert cells[0] not in found
            command, message = (re.fullmatch("(`+) ?(.*?) ?\\1", cells[i])[2] for i in (1, 3))
            found[cells[0]] = command, int(cells[2]), message
    return found


ROWS = rows()
ON_OTHER_DISKS = [name for name, (command, _, _) in ROWS.items() if re.search("=(full|locked)/", command)]
IN_A_PROCESS_OF_ITS_OWN = [name for name, (command, _, _) in ROWS.items() if command.split("=")[0].isupper()]
CONFIG = """
from vit_nabirds import config as config_lib

def get_config():
    config = config_lib.default()
    config.data.root, config.data.validation = "birds", 1 / 6
    config.model.pretrained = ""
    config.model.update(image_size=16, patch_size=8, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32)
    config.batch_size, config.epochs, config.log_every = 8, 4.0, 1
    config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.warmup = 1e-2, 0.05, "2 steps"
    return config
"""
FILES = {
    "mine.py": CONFIG,
    "syntax.py": "def get_config(:\n",
    "empty.py": "seed = 1\n",
    "dict.py": "def get_config():\n    return {'epochs': 3}\n",
    "none.py": "def get_config():\n    pass\n",
    "text.jpg": "3 jays\n",
    "notes/notes.txt": "3 jays\n",
}


@pytest.fixture(scope="module")
def world(prepared, undisturbed, tmp_path_factory):
    """The folder in which the commands of the page are typed."""
    world = tmp_path_factory.mktemp("world")
    for name in ("photos", "empty", "notes", "full", "locked"):
        (world / name).mkdir()
    for name, text in FILES.items():
        (world / name).write_text(text)
    shutil.copytree(prepared, world / "birds")
    shutil.copytree(prepared.parent / "archive", world / "archive")
    shutil.copytree(undisturbed, world / "runs" / "birds")
    shutil.copytree(undisturbed, world / "runs" / "old")
    edit_metadata(world / "runs" / "old", lambda fields: fields.update(format=1))
    export(undisturbed, world / "my-birds")
    shutil.copy(next((world / "archive" / "images").rglob("*.jpg")), world / "photos")
    table = pl.read_parquet(prepared / "metadata.parquet")
    parts = {
        "no-test": table.filter("is_training_img"),
        "no-training": table.filter(~pl.col("is_training_img")),
        "one-species": table.filter(pl.col("species_name") == table["species_name"][0]),
        "other-birds": table.head(-1),
    }
    for name, part in parts.items():
        shutil.copytree(prepared, world / name)
        part.write_parquet(world / name / "metadata.parquet")
    return world


@pytest.fixture
def typed(world, monkeypatch, capfd):
    """Runs a command of the page in this process: its exit code and its lines, without times."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(world / "no token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    log = logging.getLogger("vit_nabirds")
    before = log.handlers[:], log.level, log.propagate

    def run(command: str) -> tuple[int, list[str]]:
        code = cli.main(shlex.split(command))
        return code, re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", capfd.readouterr().err).splitlines()

    yield run
    log.handlers[:], log.level, log.propagate = before


def check(found: tuple[int, list[str]], name: str) -> None:
    """The last line is the page's message, in which … stands for anything; it is the only error."""
    _, code, message = ROWS[name]
    pattern = ".*".join(map(re.escape, message.split("…")))
    *others, last = found[1]
    assert re.fullmatch(pattern, last.removeprefix("error: ")), found
    assert found[0] == code and not [line for line in others if line.startswith(("error: ", "Traceback"))], found


def files_in(folder: Path) -> dict[Path, tuple]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ON_OTHER_DISKS + IN_A_PROCESS_OF_ITS_OWN])
def test_a_mistake_says_what_the_page_says_and_writes_nothing(world, typed, name):
    before = files_in(world)
    check(typed(ROWS[name][0]), name)
    reasons = world / "new.csv"  # of pictures that cannot be read
    with contextlib.suppress(FileNotFoundError):
        reasons.rename(world.parent / f"{world.name}.csv")
    assert files_in(world) == before and not (world / "new").exists() and not (world / "runs" / "new").exists()


@pytest.mark.parametrize("name", IN_A_PROCESS_OF_ITS_OWN)
def test_a_mistake_in_the_environment_says_what_the_page_says(main, world, name):
    variable, *arguments = shlex.split(ROWS[name][0])
    environment = main.environment() | dict([variable.split("=")])
    done = main(*arguments, cwd=world, env=environment)
    check((done.returncode, done.stderr.splitlines()), name)


OTHER_DISKS = """
set -e
cd "$1"
mount -t tmpfs -o size=48k tmpfs full
mount -t tmpfs -o ro tmpfs locked
"$2" -c "$3" "${@:4}"
find full -name "*.partial"
"""
TYPE_ALL = """
import shlex, sys
from vit_nabirds import cli
for command in sys.argv[1:]:
    code = cli.main(shlex.split(command))
    print("ended with", code, file=sys.stderr, flush=True)
"""


def test_storage_that_takes_nothing_is_reported_as_the_page_says(world):
    commands = [ROWS[name][0] for name in ON_OTHER_DISKS]
    done = with_own_mounts(OTHER_DISKS, world, sys.executable, TYPE_ALL, *commands)
    assert not done.stdout.endswith(".partial\n")
    said = re.split(r"ended with (\d+)\n", done.stderr)
    assert len(said) == 2 * len(commands) + 1, done.stderr
    for name, lines, code in zip(ON_OTHER_DISKS, said[::2], said[1::2], strict=False):
        check((int(code), lines.splitlines()), name)


def test_the_page_has_enough_mistakes():
    assert len(ROWS) >= 100 and ON_OTHER_DISKS and IN_A_PROCESS_OF_ITS_OWN
