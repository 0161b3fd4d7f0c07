"""`sweep`: a run for each combination of values, each in a process and workdir of its own."""

import json
import logging
import shutil
import signal
import time
from pathlib import Path

import pytest
from tiny_runs import losses

from vit_nabirds import cli
from vit_nabirds.commands import sweep
from vit_nabirds.commands.sweep import planned, split_values
from vit_nabirds.errors import ConfigError
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.locks import lock
from vit_nabirds.runs.summary import read_summary


@pytest.fixture(autouse=True)
def our_log(monkeypatch):
    """Undoes what a command in this process does to the package's log."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    log = logging.getLogger("vit_nabirds")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def swept(main, workdir: Path, *arguments) -> int:
    """A sweep in this process."""
    return cli.main(["sweep", *main.tiny, f"--workdir={workdir}", *map(str, arguments)])


def refused(main, capfd, workdir: Path, *arguments) -> str:
    """The one line of a sweep that writes nothing."""
    before = sorted(workdir.rglob("*"))
    assert swept(main, workdir, *arguments) in (1, 2)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and sorted(workdir.rglob("*")) == before
    return said[0]


@pytest.mark.parametrize(
    "text, values",
    [
        ("1e-5,3e-5, 1e-4", ["1e-5", "3e-5", "1e-4"]),
        ("(0.35,1.0),(0.5,1)", ["(0.35,1.0)", "(0.5,1)"]),
        ("'10 steps',\"1 epoch\"", ["10 steps", "1 epoch"]),
        ("'a,b',c", ["a,b", "c"]),
        ("'',x", ["", "x"]),
        ("'(',x", ["(", "x"]),
        ("layers/([0-3]|5)/ lr=0.1; cls_token frozen,''", ["layers/([0-3]|5)/ lr=0.1; cls_token frozen", ""]),
        ("Anna's,b", ["Anna's", "b"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_a_run_for_each_combination_has_a_name_that_says_it(tiny_config):
    def names(*settings):
        return [run.workdir.name for run in planned(tiny_config, Path("sweep"), settings)]

    rates = names("optimizer.learning_rate=1e-5,0.0003", "seed=0,1")
    assert rates == [f"learning_rate={rate},seed={seed}" for rate in ("1e-05", "0.0003") for seed in (0, 1)]
    assert names("optimizer.name=adamw,lion") == ["optimizer.name=adamw", "optimizer.name=lion"]
    tiny_config.augment.crop = "resized"
    assert names("augment.area=(0.35,1.0)", "optimizer.warmup=1 epoch") == ["area=0.35-1.0,warmup=1-epoch"]
    assert names("model.pretrained=../w/a b") == ["pretrained=..-w-a-b"]
    run = planned(tiny_config, Path("sweep"), ["augment.area=(0.35,1)", "epochs=3"])[0]
    assert run.config.augment.area == (0.35, 1.0) and run.config.epochs == 3 and run.config.batch_size == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "sweep needs --set"),
        (
            ["--set=optimizer.lerning_rate=1"],
            "no field 'optimizer.lerning_rate'; did you mean optimizer.learning_rate?",
        ),
        (["--set=lr=1"], "did you mean optimizer.learning_rate?"),
        (["--set=batch_size=8,many"], "config.batch_size is 'many': it must be between 1 and 1,000,000"),
        (["--set=seed=0,-1"], "seed=-1: config.seed is -1: it must be between 0 and"),
        (["--set=augment.mixed=0.5"], "mixed=0.5: config.augment.mixed is set, but has no effect without"),
        (["--set=seed"], "--set=seed: write FIELD=VALUE,VALUE"),
        (["--set=seed=1,"], "a value is empty"),
        (["--set=augment.area=(0.3,1"], "a bracket or a quote is open at the end: ) is missing"),
        (["--set=seed=1", "--set=seed=2"], "seed has values already"),
        (["--set=seed=1,1"], "--set gives two runs the name seed=1"),
        (["--set=model.pretrained=a,gs://b/c"], "is an address"),
        (["--set=seed=0,1", "--index=2"], "--index is 2, but the sweep has 2 runs: submit it with --array=0-1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(main, tmp_path, capfd, arguments, message):
    assert message in refused(main, capfd, tmp_path, *arguments)


def test_a_dry_run_lists_the_runs_with_their_numbers_and_states(main, undisturbed, tmp_path, capfd):
    shutil.copytree(undisturbed, tmp_path / "seed=0", ignore=shutil.ignore_patterns("checkpoints"))
    assert swept(main, tmp_path, "--set=seed=0,1", "--dry_run") == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines[0] == ["0", "finished", str(tmp_path / "seed=0")]
    assert lines[1] == ["1", "not", "started", str(tmp_path / "seed=1")]
    assert lines[2][:2] == ["2", "runs:"] and "--array=0-1" in lines[2]


def test_what_is_finished_is_shown_and_not_trained_again(main, undisturbed, tmp_path, capfd):
    shutil.copytree(undisturbed, tmp_path / "seed=0")
    assert swept(main, tmp_path, "--set=seed=0", "--config.log_every=7") == 0  # which changes no result
    assert "seed=0" in capfd.readouterr().out and not (tmp_path / "seed=0" / "train.log").exists()
    said = refused(main, capfd, tmp_path, "--set=seed=0", "--config.epochs=5")
    assert "seed=0 holds a run with another configuration (epochs: 4.0 -> 5.0)" in said
    assert "is the workdir of a run" in refused(main, capfd, tmp_path / "seed=0", "--set=seed=0")


def test_two_sweeps_do_not_train_in_one_folder(main, tmp_path, capfd):
    with lock(tmp_path / "lock", ""):
        assert "another sweep" in refused(main, capfd, tmp_path, "--set=seed=0")


def test_a_task_of_an_array_trains_its_run(main, undisturbed, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    arguments = ["--set=seed=5,0", "--set=epochs=4"]
    assert swept(main, tmp_path, *arguments, "--dry_run") == 0
    run = Path(capfd.readouterr().out.strip())
    assert run == tmp_path / "seed=0,epochs=4.0" and not run.exists()
    assert swept(main, tmp_path, *arguments) == 0
    assert losses(run) == losses(undisturbed) and [file.name for file in tmp_path.iterdir()] == [run.name]


def test_several_processes_of_a_sweep_need_a_number(main, tmp_path):
    options = cli.parse("sweep", sweep, [*main.tiny, f"--workdir={tmp_path}", "--set=seed=0"])
    with pytest.raises(ConfigError, match="2 processes of it: start it as one task"):
        sweep.run(options, ProcessGroup(0, 2))


def test_a_sweep_that_is_stopped_goes_on_and_a_run_that_fails_stops_no_other(main, tmp_path):
    """The first run fails, the second one is stopped by the signal to the sweep."""
    command = ["sweep", *main.tiny, "--workdir=sweep", "--set=batch_size=7,8", "--config.epochs=20"]
    command += ["--config.evaluate.every=20 epochs", "--config.checkpoint.every=20 epochs"]
    log = tmp_path / "sweep" / "batch_size=8" / "train.log"
    running = main(*command, devices=2, start_only=True)
    end = time.monotonic() + 120
    while not (log.exists() and "steps 0 to" in log.read_text()):
        assert running.poll() is None and time.monotonic() < end, running.stdout.read()
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 75 and "stopped: run the same command again" in output, output
    stopped = read_summary(log.parent)
    assert stopped.results is None and list((log.parent / "checkpoints").glob("[0-9]*"))

    done = main(*command, devices=2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"steps {stopped.last_step} to 100" in log.read_text()
    assert "batch_size=7: exit code 2: error: config.batch_size is 7, which 2 devices cannot share" in done.stderr
    assert "error: 1 of 2 runs failed: batch_size=7 (exit code 2)" in done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("batch_size")}
    accuracy = json.loads((log.parent / "results.json").read_text())["test"]["accuracy"]
    assert "not started" in rows["batch_size=7"] and f"{accuracy:.4f}" in rows["batch_size=8"]
