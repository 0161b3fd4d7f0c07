"""The command line: commands, exit codes, signals, devices, messages."""

import json
import os
import signal
import sys
import time

import pytest

from vit_nabirds.data import batches as data
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.runs.tracker import read_evaluations, read_metrics


def trace(workdir):
    return [line["train/loss"] for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]


def test_trace_is_the_same_on_one_two_and_four_devices(main, tmp_path):
    runs = {}
    for devices in (1, 2, 4):
        workdir = tmp_path / str(devices)
        done = main("train", *main.tiny, f"--workdir={workdir}", devices=devices)
        assert done.returncode == 0, done.stderr
        assert f"on {devices} cpu device(s)" in done.stderr
        runs[devices] = trace(workdir)
        assert json.loads((workdir / "results.json").read_text())["test"]["examples"] == 15
    assert len(runs[1]) == 20
    assert runs[2] == pytest.approx(runs[1], rel=1e-4)
    assert runs[4] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_saves_and_exits_with_75_and_the_same_command_goes_on(main, tmp_path, number, workers):
    """The signal goes to the whole process group, as Slurm's and the terminal's do, workers included."""
    command = [*main.tiny, f"--workdir={tmp_path / 'run'}", f"--config.data.workers={workers}", "--config.epochs=200"]
    running = main(*command, start_only=True, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: len(read_metrics(metrics)) >= 3, running)
    os.killpg(running.pid, number)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 75, output
    assert "Traceback" not in output and "run the same command again" in output
    stopped = read_metrics(metrics)[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()
    going_on = main(*command, start_only=True, start_new_session=True)
    wait_until(lambda: read_metrics(metrics)[-1]["step"] > stopped, going_on)
    os.killpg(going_on.pid, signal.SIGTERM)
    output, _ = going_on.communicate(timeout=120)
    assert going_on.returncode == 75, output
    steps = [line["step"] for line in read_metrics(metrics) if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_second_signal_ends_it_at_once(main):
    """In a compilation of many seconds, which Python cannot interrupt."""
    running = main("train", *main.tiny, "--workdir=run", "--config.model.num_layers=16", start_only=True)
    for line in running.stdout:
        if "parameters" in line:
            break
    running.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=60)[0]
    assert running.returncode == -signal.SIGKILL and "stopped at once" in output


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_demonstration_end_to_end(main, tmp_path):
    """Shortened; alone, `python main.py` is the same chain to the end."""
    short = ["--config.epochs=2", "--config.evaluate.every=1 epoch", "--config.optimizer.warmup=5 steps"]
    done = main(*short)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo"
    assert (run / "birds" / "metadata.parquet").exists()
    assert "on 1 cpu device(s)" in done.stderr  # XLA_FLAGS, where set, has the last word
    assert json.loads((run / "results.json").read_text())["test"]["examples"] == 240
    assert "tensorboard --logdir=" in done.stderr and "configs/nabirds_vit_b16.py" in done.stderr
    evaluations = read_evaluations(run / "metrics.jsonl")
    assert list(evaluations) == [20, 40]
    results = json.loads(main("evaluate", f"--workdir={run}").stdout)
    assert results["test"]["accuracy"] == max(e["test/accuracy"] for e in evaluations.values())


def test_the_cpu_becomes_several_devices(main, tmp_path):
    """Without XLA_FLAGS, as users run it; `evaluate` takes as many as training had."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    short = ["--config.cpu_devices=4", "--config.epochs=1", "--workdir=run"]
    done = main(*main.tiny, *short, env=environment)
    assert "on 4 cpu device(s)" in done.stderr and done.returncode == 0, done.stderr
    trained = json.loads((tmp_path / "run" / "results.json").read_text())
    done = main("evaluate", "--workdir=run", env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"] == trained["test"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_exits_with_75(main, number):
    for wait in (0.5, 1.0, 2.0):
        running = main(*main.tiny, "--workdir=run", "--config.epochs=2000", start_only=True, start_new_session=True)
        time.sleep(wait)
        os.killpg(running.pid, number)
        time.sleep(0.02)
        os.killpg(running.pid, number)  # the same one on another way
        output, _ = running.communicate(timeout=120)
        assert running.returncode == 75, output
        assert "Traceback" not in output


USAGE = {
    "unknown command": (["trian"], "no command 'trian'"),
    "unknown flag": (["prepare", "--archiv=x"], "Unknown command line flag 'archiv'. Did you mean: archive"),
    "flag of another command": (["--archive=x"], "Unknown command line flag 'archive'"),
    "missing flag": (["prepare", "--out=x"], "--archive"),
    "neither run nor model": (["predict", "--images=x", "--out=y.csv"], "workdir"),
    "stray argument": (["evaluate", "--workdir=x", "y"], "unexpected argument 'y'"),
    "mistyped field": (["--config.optimizer.lerning_rate=1"], "did you mean 'optimizer.learning_rate'"),
    "field of another group": (["--config.learning_rate=1"], "did you mean 'optimizer.learning_rate'"),
    "wrong type": (["--config.batch_size=many"], "config.batch_size"),
    "fraction for a whole number": (["--config.batch_size=1.5"], "config.batch_size"),
    "no flags": (["prepare"], "--archive"),
    "empty file name": (["--config="], "the configuration file '' cannot be read"),
    "file name with a space": (["--config=my file.py"], "the configuration file 'my file.py' cannot be read"),
    "no configuration file": (["--config=nothing.py"], "nothing.py"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_exits_with_2(main, case):
    arguments, message = USAGE[case]
    done = main(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


CONFIG = """
from vit_nabirds import config as config_lib
def get_config():
    config = config_lib.default()
    {line}
    return config
"""


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.optimizer.lerning_rate = 1.0", "did you mean 'optimizer.learning_rate'"),
        ("config.batch_size = 'many'", "batch_size"),
        ("config.nothing.here = 1", "nothing"),
    ],
)
def test_mistake_in_a_configuration_file(main, tmp_path, line, message):
    file = tmp_path / "mine.py"
    file.write_text(CONFIG.format(line=line))
    done = main(f"--config={file}")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert "mine.py" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.batch_size=7", "--config.cpu_devices=1"], "batch_size is 7, which 2 devices cannot share"),
        (["--config.data.root=/nowhere"], "/nowhere/metadata.parquet is missing"),
        (["--config.model.pretrained=/nowhere"], "no folder '/nowhere'"),
        (["--config.optimizer.name=lion"], "'adamw' or 'sgd'"),
    ],
)
def test_a_mistake_is_one_message_and_exits_with_1(main, tmp_path, arguments, message):
    done = main(*main.tiny, *arguments, f"--workdir={tmp_path / 'run'}", devices=2)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_prepare(main, tmp_path):
    draw_archive(tmp_path / "archive", species=2, train=2, test=1, size=(40, 60))
    done = main("prepare", "--archive=archive", "--out=out", "--train_size=40", "--test_size=32")
    assert done.returncode == 0 and "6 photographs (4 train, 2 test), 2 species" in done.stdout
    table = data.read_table(tmp_path / "out")
    assert data.open_split(tmp_path / "out", table, train=True).size == 40
    assert main("prepare", "--archive=archive", "--out=table", "--metadata_only").returncode == 0
    assert [file.name for file in (tmp_path / "table").iterdir()] == ["metadata.parquet"]


def test_mistakes_of_the_other_commands(main, tmp_path):
    for arguments, message in (
        (["prepare", "--archive=/nowhere", f"--out={tmp_path / 'out'}"], "/nowhere: no such folder"),
        (["evaluate", f"--workdir={tmp_path}"], "holds no run"),
    ):
        done = main(*arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_help_lists_the_commands(main):
    assert main("train", "--help").returncode == 0
    done = main("help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "prepare", "evaluate", "--config", "75"))
    assert "--archive" in main("prepare", "--help").stdout


def test_a_full_disk_is_one_message():
    from vit_nabirds.errors import message_of

    # What Orbax raises of it; a real full disk needs the right to mount one.
    error = ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']")
    assert message_of(error).startswith("No space left on device: make room, and run the same command again")
    assert message_of(ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
@pytest.mark.parametrize("given, expected", [({}, "glibc.malloc.hugetlb=1"), ({"GLIBC_TUNABLES": ""}, "''")])
def test_it_starts_itself_again_for_large_pages_unless_told_otherwise(main, tmp_path, given, expected):
    config = tmp_path / "config.py"
    config.write_text("import os\n\n\ndef get_config():\n    raise ValueError(repr(os.environ['GLIBC_TUNABLES']))\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
    told = main(f"--config={config}", env=environment)
    assert told.returncode == 2 and expected in told.stderr
