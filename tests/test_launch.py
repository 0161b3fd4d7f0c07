"""The scripts of launch/, without a Slurm: what they would submit, and what they refuse."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vit_nabirds.data.pack import pack

REPOSITORY = Path(__file__).parent.parent
TRAINING = ["--", "--config=configs/birds60.py", "--workdir=runs/my birds"]


def launch(*command, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return subprocess.run(command, cwd=REPOSITORY, env=kept | environment, capture_output=True, text=True)


@pytest.mark.parametrize("job", ["train", "train_by_node"])
def test_a_dry_run_shows_what_would_be_submitted(job):
    options = ["--dry-run", "--nodes=3", "--time=1:00:00"]
    shown = launch(f"launch/{job}.sbatch", *options, *TRAINING, SBATCH_ACCOUNT="def-birds")
    assert shown.returncode == 0, shown.stderr
    for line in (
        f" sbatch --nodes=3 --time=1:00:00 launch/{job}.sbatch --config=configs/birds60.py --workdir=runs/my\\ birds",
        "  --nodes=3", "  --time=1:00:00", "  --account=def-birds", "  --ntasks-per-node=1", "  --signal=TERM@180",
        "  --requeue", "  --open-mode=append", "  --output=%x-%j.log",
    ):  # fmt: skip
        assert line in shown.stdout.splitlines()
    assert shown.stdout.count("--nodes=") == 2 and "python main.py train --config=configs/birds60.py" in shown.stdout


@pytest.mark.parametrize(
    "options, environment, gone",
    [
        (["--mem=8G"], {}, "--mem-per-cpu=4G"),
        (["--ntasks=8"], {}, "--ntasks-per-node=1"),
        (["--cpus-per-gpu=4"], {}, "--cpus-per-task=8"),
        ([], {"SBATCH_MEM_PER_GPU": "8G"}, "--mem-per-cpu=4G"),
    ],
)
def test_an_option_replaces_the_one_that_slurm_refuses_beside_it(options, environment, gone):
    shown = launch("launch/train.sbatch", "--dry-run", *options, *TRAINING, **environment).stdout
    assert f"replaced: {gone}" in shown and f"  {gone}" not in shown
    kept = {"--mem-per-cpu=4G", "--ntasks-per-node=1", "--cpus-per-task=8", "--nodes=1"} - {gone}
    assert all(f"  {option}" in shown for option in kept)


def test_a_sweep_is_an_array_whose_tasks_have_the_whole_command():
    sweep = ["--", "sweep", "--set=seed=0,1", "--set", "epochs=1,2", "--workdir=runs/my birds"]
    shown = launch("launch/train.sbatch", "--dry-run", "--array=0-3", *sweep)
    assert shown.returncode == 0 and "  --array=0-3" in shown.stdout.splitlines(), shown.stderr
    command = " sweep --set=seed=0\\,1 --set epochs=1\\,2 --workdir=runs/my\\ birds"
    assert f" launch/train.sbatch{command}\n" in shown.stdout and f"main.py{command}\n" in shown.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--nodes=2"], "usage: launch/train.sbatch"),
        (["train", "-N", "2", *TRAINING], "write sbatch's options like --nodes=2"),
        (
            ["train", "--", "--config=configs/birds60.py"],
            "give the trainer a --workdir=DIR on storage that all nodes share",
        ),
        (["train", "MAX_FRUITLESS=many", *TRAINING], "MAX_FRUITLESS is 'many': give a number"),
        (["train", "STAGE=README.md", *TRAINING], "STAGE=README.md is neither a .tar file"),
        (["train", "--", "sweep", "--set=seed=0,1", "--workdir=runs"], "give sbatch --array=0-N"),
    ],
)
def test_what_cannot_be_submitted_is_refused(arguments, message):
    environment = dict(word.split("=", 1) for word in arguments if word[0].isupper())
    options = [word for word in arguments[1:] if not word[0].isupper()]
    refused = launch(f"launch/{arguments[0]}.sbatch", *options, **environment)
    assert refused.returncode == 2 and message in refused.stderr


def test_a_job_is_shown_from_inside_an_allocation_too():
    shown = launch("launch/train.sbatch", "--dry-run", "--nodes=3", *TRAINING, SLURM_JOB_ID="1", SBATCH_TIMELIMIT="5")
    assert "  --nodes=3" in shown.stdout.splitlines() and "  --time=5" in shown.stdout.splitlines()


def test_data_is_staged_once_on_a_node(prepared, tmp_path):
    archive, disk = tmp_path / "prepared.tar", tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["tar", "-cf", archive, "-C", prepared.parent, prepared.name], check=True)
    stage = ["launch/stage_data.sh", str(archive)]
    tasks = [
        subprocess.Popen(stage, cwd=REPOSITORY, env=os.environ | {"SLURM_TMPDIR": str(disk)}, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    said = [task.communicate()[0].decode() for task in tasks]
    assert all(task.returncode == 0 for task in tasks)
    assert sum("is unpacked in" in text for text in said) == 1
    assert (disk / prepared.name / "metadata.parquet").read_bytes() == (prepared / "metadata.parquet").read_bytes()
    assert launch("launch/stage_data.sh", str(tmp_path / "none.tar"), SLURM_TMPDIR=str(disk)).returncode != 0
    os.utime(archive, (0, 0))  # another archive than the one that was unpacked
    stale = launch(*stage, SLURM_TMPDIR=str(disk))
    assert stale.returncode == 1 and f"{disk / prepared.name} was made from another archive" in stale.stderr


def test_a_packed_folder_is_staged_without_its_images(prepared, tmp_path):
    folder, disk = tmp_path / "my birds", tmp_path / "disk"
    shutil.copytree(prepared, folder)
    options, stage = ["launch/train.sbatch", "--dry-run", *TRAINING], ["launch/stage_data.sh", f"{folder}/"]
    refused = launch(*options, STAGE=str(folder))
    assert refused.returncode == 2 and "nor a packed folder (main.py prepare --pack)" in refused.stderr
    refused = launch(*stage, SLURM_TMPDIR=str(disk))
    assert refused.returncode == 1 and "nor a packed folder (main.py prepare --pack)" in refused.stderr
    assert not disk.exists()

    pack(folder)
    shown = launch(*options, STAGE=str(folder), SLURM_TMPDIR="/disk").stdout
    assert "--config.data.root=/disk/my\\ birds\n" in shown
    done = [launch(*stage, SLURM_TMPDIR=str(disk)) for _ in range(2)]
    assert [task.returncode for task in done] == [0, 0] and done[1].stdout == ""
    assert done[0].stdout.strip().endswith(f"is copied to {disk / 'my birds'}")
    copied = sorted(file.relative_to(disk / "my birds") for file in (disk / "my birds").rglob("*.*"))
    assert [str(file) for file in copied] == [
        "metadata.parquet", "packed/index.parquet", "packed/test.npy", "packed/train.npy", "prepared.json"
    ]  # fmt: skip
    assert all((disk / "my birds" / file).read_bytes() == (folder / file).read_bytes() for file in copied)
    os.utime(folder / "metadata.parquet", (0, 0))  # a label was corrected
    stale = launch(*stage, SLURM_TMPDIR=str(disk))
    assert stale.returncode == 1 and f"{disk / 'my birds'} was made from another archive" in stale.stderr


def test_tensorboard_listens_on_this_machine_alone(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path / 'bin'}:$PATH")
    (tmp_path / "bin" / "tensorboard").write_text('#!/bin/sh\necho "$@"')
    (tmp_path / "bin" / "tensorboard").chmod(0o755)
    shown = launch("launch/tensorboard.sh", str(tmp_path), "6007", VENV=str(tmp_path), USER="ann").stdout
    assert "ssh -N -L 6007:localhost:6007 ann@" in shown
    assert f"--logdir={tmp_path} --host=localhost --port=6007" in shown
