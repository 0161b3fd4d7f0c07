"""What `check` finds before a training starts, and that it leaves nothing behind."""

import math
import os
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
from tiny_runs import prepared_run, with_own_mounts

from vit_nabirds import cli
from vit_nabirds.audit import duration, pictures, slurm, storage, weights
from vit_nabirds.audit.duration import Speed
from vit_nabirds.audit.slurm import Job
from vit_nabirds.data.pack import pack
from vit_nabirds.errors import ConfigError
from vit_nabirds.parallel import gpus

TINY = f"--config={Path(__file__).parent / 'tiny_config.py'}"


@pytest.fixture
def check(prepared, tmp_path, monkeypatch, capfd):
    """Runs `check` on the tiny data: its exit code, and what it has printed to stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(["check", TINY, f"--config.data.root={prepared}", "--config.cpu_devices=2", *arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def birds(prepared, tmp_path):
    """A copy of the tiny data that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "birds"))


@pytest.fixture
def run(tiny_config, birds, tmp_path):
    """A run that has not started, on that copy."""
    tiny_config.data.root = str(birds)
    return prepared_run(tiny_config, tmp_path / "run")


def test_all_is_said_of_a_training_that_is_ready_and_nothing_is_written(check, tmp_path):
    code, out, err = check("--workdir=run", "--deep", "--time=0:05:00", "--images_per_second=1")
    assert code == 0 and out.startswith("run on the CPU, as 2 devices\n") and out.endswith("\nready\n"), out + err
    heads = [line.split()[0] for line in out.splitlines()[1:-1] if not line.startswith(" ")]
    expected = "data model run classes weights storage deep step collectives memory duration"
    assert heads == expected.split()
    for text in (
        "40 train, 8 validation and 15 test", "all new, drawn at random", "the data are not packed", "63 photographs",
        "10 training photographs each", "about 4 min for 20 steps and 4 evaluations", "about 4 jobs of 5 min",
    ):  # fmt: skip
        assert text in out
    assert not any(tmp_path.iterdir())


def test_mistakes_that_do_not_depend_on_each_other_are_listed_together(check, tmp_path):
    (tmp_path / "file").write_text("")
    wrong = ["--config.batch_size=9", "--config.data.root=nowhere", "--config.model.pretrained=./none"]
    code, out, err = check(*wrong, "--workdir=file/run")
    assert code == 2 and err == ""
    first, *problems = out.splitlines()
    assert first == "to fix:" and [line[:3] for line in problems] == ["1. ", "2. ", "3. ", "4. "]
    for text in (
        "config.batch_size is 9",
        "nowhere/metadata.parquet is missing",
        "file is a file",
        "no folder './none'",
    ):
        assert sum(text in line for line in problems) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def damage(birds: Path, run) -> dict[str, str]:
    """A truncated, a replaced and a missing photograph, one of each split; their names by what is wrong."""
    train, held, test = (birds / "cleaned_images" / split.path(0) for split in run.splits.values())
    train.write_bytes(train.read_bytes()[:-200])
    shutil.copyfile(birds / "cleaned_images" / run.train_split.path(1), held)
    test.unlink()
    return {"truncated": train.name, "replaced": held.name, "missing": test.name}


def test_photographs_that_are_damaged_changed_or_missing_are_named(run, birds):
    assert pictures.damaged(run).problems == pictures.missing(run).problems == []
    names = damage(birds, run)
    (problem,) = pictures.missing(run).problems
    assert problem.startswith("1 of 15 test photographs are missing: run the same `main.py prepare` again.")
    assert names["missing"] in problem and names["truncated"] not in problem
    (problem,) = pictures.damaged(run).problems
    assert problem.startswith("1 of 40 training, 1 of 8 validation, 1 of 15 test photographs cannot be read")
    assert all(name in problem for name in names.values()) and problem.count("\n") == 3


def test_of_many_damaged_photographs_a_few_are_named_and_all_are_counted(run, birds):
    for image in (birds / "cleaned_images").glob("*/*"):
        image.write_bytes(b"no image")
    (problem,) = pictures.damaged(run).problems
    assert problem.startswith("40 of 40 training, 8 of 8 validation, 15 of 15 test photographs cannot")
    assert problem.count("\n") == 6 and problem.endswith("and 58 more")


@pytest.mark.parametrize("most, tolerated", [(0.2, True), (0.0, True), (None, False)])  # one of a split always is
def test_as_many_as_the_training_skips_are_a_warning(tiny_config, birds, tmp_path, most, tolerated):
    tiny_config.data.root = str(birds)
    if most is not None:
        tiny_config.data.on_error, tiny_config.data.max_skipped = "skip", most
    run = prepared_run(tiny_config, tmp_path / "run")
    damage(birds, run)
    found = pictures.damaged(run)
    assert (len(found.problems), len(found.warnings)) == ((0, 1) if tolerated else (1, 0))


def test_a_packed_photograph_that_has_changed_is_named(tiny_config, birds, tmp_path):
    pack(birds)
    tiny_config.data.root = str(birds)
    run = prepared_run(tiny_config, tmp_path / "run")
    assert pictures.damaged(run).problems == [] and "the data are packed" in storage.has_room(run).lines[1]
    run = prepared_run(tiny_config, tmp_path / "run")  # which has not seen that they are whole
    with (birds / "packed" / "test.npy").open("r+b") as packed:
        packed.seek(-5, os.SEEK_END)
        packed.write(b"\0\1\2\3\4")
    (problem,) = pictures.damaged(run).problems
    assert run.test_split.path(14) in problem and "after deleting packed/" in problem


def test_classes_without_photographs_and_uneven_ones_are_warned_of(tiny_config, birds, tmp_path, monkeypatch):
    table = pl.read_parquet(birds / "metadata.parquet")
    lost, *_ = names = table["species_name"].unique().sort()
    name, trains = pl.col("species_name"), pl.col("is_training_img").cast(bool)
    rows = table.filter(~((name == lost) & trains), ~((name == names[1]) & ~trains))
    rows.write_parquet(birds / "metadata.parquet")
    tiny_config.data.root, tiny_config.data.validation = str(birds), 0.0
    run = prepared_run(tiny_config, tmp_path / "run")
    learned, measured = pictures.of_classes(run).warnings
    assert learned == f"1 of 4 classes have no training photograph, so nothing is learned of them: {lost}"
    assert measured == f"1 of 4 classes have no test photograph, so their accuracy is not measured: {names[1]}"
    monkeypatch.setattr(pictures, "UNEVEN", 0.9)
    assert "the classes are uneven" in pictures.of_classes(run).warnings[-1]


def test_what_is_loaded_resized_and_new_is_said(tiny_config, hf_folder, undisturbed, tmp_path):
    lines = weights.of_weights(prepared_run(tiny_config, undisturbed)).lines
    assert lines == ["weights      of this run's checkpoint of step 20"]
    tiny_config.model.pretrained = str(hf_folder)
    tiny_config.model.update(dict.fromkeys(("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")))
    first, *rest = weights.of_weights(prepared_run(tiny_config, tmp_path / "run")).lines
    assert first == f"weights      {hf_folder}" and [line.split()[0] for line in rest] == [
        "loaded", "resized", "new", "ignored"
    ]  # fmt: skip
    assert rest[2].endswith("the classifier")


MOUNTED = """
set -e
mount -t tmpfs -o size=64k tmpfs "$1"
mkdir "$1/read-only"
mount -t tmpfs -o ro tmpfs "$1/read-only"
"$2" -c "$3" "$1" "$4"
"""
ON_STORAGE = """
import sys
from pathlib import Path
from tiny_config import get_config
from tiny_runs import prepared_run
from vit_nabirds.audit import storage
top, config = Path(sys.argv[1]), get_config()
config.data.root = sys.argv[2]
run = prepared_run(config, top / "new" / "run")
print(*storage.has_room(run).problems)
print(*storage.may_write(top / "run").problems)
print(*storage.may_write(top / "read-only" / "run").problems)
print(storage.file_system(top / "read-only"), list(top.iterdir()), list((top / "read-only").iterdir()))
print(len(storage.is_shared(top / "run", top, nodes=2).warnings), len(storage.is_shared(top, top, nodes=1).warnings))
"""


def test_a_full_and_a_read_only_disk_are_found_without_writing_to_them(prepared, tmp_path):
    (top := tmp_path / "mounted").mkdir()
    done = with_own_mounts(MOUNTED, top, sys.executable, ON_STORAGE, prepared)
    assert done.returncode == 0, done.stderr
    full, nothing, read_only, left, shared = done.stdout.splitlines()
    assert full.startswith(f"{top} has 0.0625 MiB free, but the checkpoints need ") and nothing == ""
    assert read_only.startswith(f"{top}/read-only cannot be written to (Read-only file system): choose another")
    assert left == f"tmpfs [{top / 'read-only'!r}] []" and shared == "2 0"


@pytest.mark.parametrize(
    "folder, kind",
    [("/home/ann", "ext4"), ("/scratch/ann/run", "lustre"), ("/my disk/x", "nfs4"), ("/scratchy", "ext4")],
)
def test_the_kind_of_a_file_system_is_that_of_the_nearest_mount(tmp_path, monkeypatch, folder, kind):
    mounts = [("/", "xfs"), ("/", "ext4"), ("/scratch", "lustre"), ("/my\\040disk", "nfs4")]
    lines = [f"{n} 1 0:{n} / {place} rw shared:1 - {kind} device rw\n" for n, (place, kind) in enumerate(mounts)]
    (tmp_path / "mountinfo").write_text("".join(lines))
    monkeypatch.setattr(storage, "MOUNTS", tmp_path / "mountinfo")
    assert storage.file_system(Path(folder)) == kind
    warnings = storage.is_shared(Path(folder), Path(folder), nodes=2).warnings
    assert len(warnings) == (2 if kind == "ext4" else 0)


def test_as_many_checkpoints_need_room_as_lie_there_at_a_time(tiny_config, undisturbed, tmp_path):
    """The two newest, the selected one and the next; of a short run fewer, and of a finished one no more."""
    finished = prepared_run(tiny_config, undisturbed)
    assert storage.most_checkpoints(finished) == len(finished.saved_steps)
    tiny_config.evaluate.every = "20 steps"
    for every, most in (("5 steps", 4), ("20 steps", 1), ("10 minutes", 4)):
        tiny_config.checkpoint.every = every
        assert storage.most_checkpoints(prepared_run(tiny_config, tmp_path / "run")) == most
    tiny_config.data.validation = 0.0
    assert storage.most_checkpoints(prepared_run(tiny_config, tmp_path / "run")) == 3


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400), ("1:30", 90), ("03:00:00", 10800), ("2-12", 216000), ("1-0:30", 88200), ("1-01:01:01", 90061),
        ("0", math.inf), ("UNLIMITED", math.inf),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert duration.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "3h", "1-", "-1", "1:2:3:4", "1 day", "1-2:3:4:5"])
def test_another_time_limit_is_a_mistake(text):
    with pytest.raises(ConfigError, match=r"--time is '.*': write it as for sbatch"):
        duration.seconds_of(text)


def test_the_speed_is_given_measured_or_a_bound(undisturbed, tmp_path):
    assert duration.speed_of(5.0, undisturbed, 1e6) == Speed(5.0, "as given")
    measured = duration.speed_of(None, undisturbed, 1e6)
    assert 0 < measured.images < 1e6 and measured.source == f"as the run in {undisturbed} was last"
    assert duration.speed_of(None, tmp_path, 1e6).is_bound and duration.speed_of(None, tmp_path, None) is None
    with pytest.raises(ConfigError, match="--images_per_second is 0"):
        duration.speed_of(0, undisturbed, None)


def test_jobs_are_counted_and_too_short_ones_are_a_problem(run):
    """20 steps of 8, 4 evaluations of 8 and two of 15 photographs, at a third each: 180.67 at one a second."""

    def found(limit, leave=10.0, requeues=True):
        return duration.of_duration(run, Speed(1.0, "as given"), limit, leave, requeues)

    assert found(None).lines == [
        "duration     about 4 min for 20 steps and 4 evaluations", "             at 1 images/s, as given"
    ]  # fmt: skip
    assert found(251).lines[-1] == "             in one job of 4 min" and found(250).lines[-1].endswith("1 time")
    assert found(131).lines[-1] == "             about 3 jobs of 2 min: it is resumed 2 times"
    assert "--no-requeue leaves it to you" in found(131, requeues=False).warnings[0] and not found(131).warnings
    assert "a job of 60 s trains nothing" in found(60).problems[0] and not found(131).problems
    bound = duration.of_duration(run, Speed(1.0, "the most", is_bound=True), None, 0, True)
    assert bound.lines[0].startswith("duration     at least 4 min")


@pytest.mark.parametrize(
    "options, described, machines, devices",
    [
        (["nodes=2", "gpus-per-node=h100:4"], None, "2x4 h100", 8),
        (["nodes=2-4", "gres=gpu:nvidia_a100-sxm4-80gb:4"], None, "2x4 a100-80", 8),
        (["nodes=2", "gpus=8", "ntasks=8"], "h200", "2x4 h200", 8),
        (["ntasks-per-node=4", "gpus-per-task=l40s:1"], None, "1x4 l40s", 4),
        (["nodes=2", "gpus-per-node=4"], "2x4 h100", "2x4 h100", 8),
        (["gres=shard:2,gpu:h100"], None, "h100", 1),
        (["gpus-per-node=h100_1g.10gb:4"], None, None, 4),
        (["gpus-per-node=a100:4"], None, None, 4),
        (["nodes=3", "ntasks-per-node=2"], None, None, 12),
        ([], "8 h100", "8 h100", 2),
        ([], None, None, 2),
    ],
)
def test_machines_are_what_the_options_of_a_job_ask_for(options, described, machines, devices):
    job = Job.of([f"--{option}" for option in options])
    assert job.machines(described) == (machines and gpus.parse(machines))
    assert job.devices(cpu_devices=2) == devices


def test_tasks_that_cannot_share_the_gpus_of_their_node_are_a_problem():
    layout = Job.of(["--ntasks-per-node=3", "--gpus-per-node=4"])
    assert "3 tasks cannot share the 4 GPUs of a node equally" in slurm.of_tasks(layout).problems[0]
    for tasks in ("--ntasks-per-node=4", "--ntasks-per-node=1", "--ntasks=2"):
        assert slurm.of_tasks(Job.of([tasks, "--gpus-per-node=4"])) == slurm.Findings()


def test_an_option_of_sbatch_has_its_dashes():
    with pytest.raises(ConfigError, match="write an option of sbatch like --sbatch=--nodes=2"):
        Job.of(["-N2"])
    job = Job.of(["--time=1", "--no-requeue", "--time=2", "--signal=B:TERM@60"])
    assert job.options["time"] == "2" and not job.requeues and job.leave == 60


def test_a_job_that_nobody_can_ask_slurm_about_is_a_warning(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no sbatch here" in slurm.of_slurm(Job.of(["--nodes=2"])).warnings[0]
    assert slurm.of_slurm(Job.of([])) == slurm.Findings()
