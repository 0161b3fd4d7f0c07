"""Before a run starts: every mistake is found, and nothing is written."""

import sys
from pathlib import Path

import pytest
from tiny_runs import prepared_run, train, with_own_mounts

from vit_nabirds.errors import ConfigError, UserError


def change(field, value):
    def to(config):
        parent = config
        *path, name = field.split(".")
        for part in path:
            parent = parent[part]
        parent[name] = value

    return to


def birds_without_size(config):
    config.data.synthetic = True
    config.model.image_size = None


WRONG_VALUES = {
    "batch size": (change("batch_size", 7), "batch_size is 7, which 2 devices cannot share"),
    "no data": (change("data.root", ""), "config.data.root is empty"),
    "odd patches": (change("model.patch_size", 5), "multiple of patch_size"),
    "missing shape": (change("model.patch_size", None), "config.model.patch_size is not set"),
    "optimizer": (change("optimizer.name", "lamb"), "optimizer.name is 'lamb': it must be 'adamw' or 'sgd'"),
    "no steps": (change("epochs", 0.0), "config.epochs is 0.0: it must be positive"),
    "duration": (change("checkpoint.every", "5 days"), "checkpoint.every is '5 days': it must be like '500 steps'"),
    "period of 0 steps": (change("evaluate.every", "0 steps"), "evaluate.every is '0 steps'"),
    "evaluation by the clock": (
        change("evaluate.every", "5 minutes"),
        "'5 minutes': it must be like '500 steps' or '1 epoch'",
    ),
    "trainable": (change("trainable", "clasifier"), "matches no parameter path"),
    "empty trainable": (change("trainable", ""), "config.trainable is ''"),
    "warm-up": (change("optimizer.warmup", "soon"), "optimizer.warmup is 'soon'"),
    "long warm-up": (change("optimizer.warmup", "20 steps"), "warmup is 20 steps, but the whole run has 20"),
    "too many workers": (change("data.workers", 100_000), "data.workers is 100000"),
    "shape of the drawn birds": (birds_without_size, "model.image_size is None"),
    "regular expression": (change("trainable", "("), r"config.trainable is '\(': it must be a regular expression"),
    "profile after the end": (change("profile", "21-30"), "asks for steps 21-30, but the run has only 20"),
    "profile": (change("profile", "12-10"), "config.profile is '12-10': it must be the first and last step"),
}
OTHER_MISTAKES = {
    "missing folder": (change("data.root", "/nowhere"), "/nowhere/metadata.parquet is missing"),
    "model too large": (
        change("model.image_size", 32),
        "test images are 16 px, but the model takes 32: prepare the photographs with --train_size=38",
    ),
    "checkpoint": (change("model.pretrained", "/nowhere"), "no folder '/nowhere'"),
}


def everything_below(folder: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", [*WRONG_VALUES, *OTHER_MISTAKES])
def test_a_mistake_is_reported_before_anything_is_written(tiny_config, tmp_path, case):
    make_mistake, message = (WRONG_VALUES | OTHER_MISTAKES)[case]
    make_mistake(tiny_config)
    with pytest.raises(UserError, match=message) as reported:
        train(tiny_config, tmp_path / "run")
    assert isinstance(reported.value, ConfigError) == (case in WRONG_VALUES)  # exit code 2
    assert not any(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_reported(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, where a run needs a folder"):
        train(tiny_config, tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file, where a run needs a folder"):
        train(tiny_config, tmp_path / "run")


def test_a_prepared_run_knows_its_memory_and_has_written_nothing(tiny_config, prepared, undisturbed, tmp_path):
    for workdir, start in ((tmp_path / "run", 0), (undisturbed, 20)):
        before = everything_below(prepared), everything_below(undisturbed)
        run = prepared_run(tiny_config, workdir)
        assert run.start == start and run.plan.total_steps == 20
        assert run.compile_step().memory_analysis().temp_size_in_bytes > 0
        assert (everything_below(prepared), everything_below(undisturbed)) == before
    assert not any(tmp_path.iterdir())


READ_ONLY = """
set -e
mount -t tmpfs tmpfs "$1"
cp -r "$2" "$1/birds"
mount -o remount,ro "$1"
cd "$1"
exec "$3" -c "$4"
"""
PREPARE = """
import errno, pathlib
from tiny_config import get_config
from tiny_runs import prepared_run
config = get_config()
config.data.root = "birds"
try:
    pathlib.Path("file").touch()
except OSError as error:
    assert error.errno == errno.EROFS
run = prepared_run(config, pathlib.Path("run"))
assert not run.workdir.exists()
print("prepared", run.compile_step().memory_analysis().temp_size_in_bytes, len(run.train_split))
"""


def test_a_run_is_prepared_on_a_read_only_file_system(prepared, tmp_path):
    (tmp_path / "mounted").mkdir()
    done = with_own_mounts(READ_ONLY, tmp_path / "mounted", prepared, sys.executable, PREPARE)
    assert done.returncode == 0, done.stderr
    word, memory, photographs = done.stdout.split()[-3:]
    assert word == "prepared" and int(memory) > 0 and int(photographs) == 40
