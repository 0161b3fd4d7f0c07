"""The command line: commands, exit codes, signals, devices, messages."""

import errno
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import at, crash, losses, read_evaluations

from vit_nabirds import cli
from vit_nabirds.config.fields import fields
from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import ConfigError, UserError, exit_code_of
from vit_nabirds.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parent.parent


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def read_until(process, text, seconds=60) -> str:
    """What the process writes up to the line with this text; without one in time, it is killed and the test fails."""
    timer, output = threading.Timer(seconds, process.kill), ""
    timer.start()
    try:
        for line in process.stdout:
            output += line
            if text in line:
                return output
    finally:
        timer.cancel()
    raise AssertionError(f"no line with {text!r} in:\n{output}")


def test_trace_is_the_same_on_one_two_and_four_devices(main, undisturbed, tmp_path):
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        done = main("train", *main.tiny, f"--workdir={workdir}", devices=devices)
        assert done.returncode == 0, done.stderr
        assert f"on {devices} cpu device(s)" in done.stderr
        assert losses(workdir) == pytest.approx(losses(undisturbed), rel=1e-4)  # on two
        assert json.loads((workdir / "results.json").read_text())["test"]["examples"] == 15


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 1)])
def test_a_signal_saves_and_exits_with_75_and_the_same_command_goes_on(main, tmp_path, number, workers):
    """The signal goes to the whole process group, as Slurm's and the terminal's do, workers included."""
    command = [*main.tiny, f"--workdir={tmp_path / 'run'}", f"--config.data.workers={workers}", "--config.epochs=20000"]
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
    assert list(losses(tmp_path / "run")) == list(range(1, max(losses(tmp_path / "run")) + 1))


def test_a_signal_that_is_left_out_of_stop_signals_is_ignored(main, tmp_path):
    running = held(main, "compiling the training step", "--config.stop_signals=INT,TERM")
    running.send_signal(signal.SIGUSR1)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0 and "stopping" not in output, output


def held(main, moment, *arguments):
    """A training that is held in native code when it logs a line with this text; released by closing its input."""
    options = dict(start_only=True, start_new_session=True, stdin=subprocess.PIPE)
    running = main("train", *main.tiny, "--workdir=run", *arguments, hold_at=moment, **options)
    read_until(running, "held")
    return running


def test_a_signal_in_the_compilation_is_answered_at_once(main, tmp_path):
    running = held(main, "compiling the training step")
    signalled = time.monotonic()
    running.send_signal(signal.SIGTERM)
    read_until(running, "stopping after the compilation; a second signal stops at once", seconds=10)
    assert time.monotonic() - signalled < 2
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 75 and "stopped at step 1 of 20, all saved" in output, output
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_a_stop_is_saved_when_nobody_reads_the_output(main, tmp_path):
    """Ctrl-C ends `tee` in `main.py 2>&1 | tee log` too."""
    running = main(*main.tiny, "--workdir=run", "--config.epochs=2000", start_only=True)
    read_until(running, "step 3/")
    running.stdout.close()
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=120) == 75
    assert len(list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))) > 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "| true"])
def test_help_goes_nowhere_without_a_traceback(closed):
    command = f"{shlex.quote(sys.executable)} {REPOSITORY / 'main.py'} help {closed}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_command_that_loses_its_reader_reports_no_success(tmp_path):
    """The pack would come after the lines that nobody reads."""
    draw_archive(tmp_path / "archive", species=2, train=2, test=1, size=(40, 60))
    command = f"{shlex.quote(sys.executable)} {REPOSITORY / 'main.py'} prepare --archive=archive --out=out --pack"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode == 0) == (tmp_path / "out" / "packed" / "index.parquet").exists()
    assert "Traceback" not in done.stderr


def test_a_second_signal_ends_it_at_once(main):
    running = held(main, "compiling the training step")
    running.send_signal(signal.SIGTERM)
    read_until(running, "stopping after the compilation")
    time.sleep(1.1)  # sooner, it would be the same signal on another way
    assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=60)
    assert running.returncode == -signal.SIGKILL
    assert "stopped at once: the same command goes on from the last complete checkpoint" in running.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["in the configuration", "steps 0 to 20"])
def test_a_signal_while_it_starts_exits_with_75(main, tmp_path, moment, number):
    if moment == "in the configuration":
        (tmp_path / "held.py").write_text("import sys\nprint('held', flush=True)\nsys.stdin.read()\n")
        options = dict(start_only=True, start_new_session=True, stdin=subprocess.PIPE)
        running = main("--config=held.py", "--workdir=run", **options)
        read_until(running, "held")
    else:
        running = held(main, moment)
    os.killpg(running.pid, number)
    os.killpg(running.pid, number)  # the same one on another way
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 75, output
    assert "Traceback" not in output and "run the same command again" in output
    assert (tmp_path / "run").exists() == (moment != "in the configuration")


def test_the_demonstration_and_what_to_do_next(main, tmp_path):
    """Shortened; alone, `python main.py` is the same chain to the end. Every command that it prints then works."""
    done = main("--config.epochs=1", "--config.optimizer.warmup=5 steps", "--workdir=runs/my demo")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "my demo"
    assert "on 1 cpu device(s)" in done.stderr  # XLA_FLAGS, where set, has the last word
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["examples"] == 240 and list(read_evaluations(run / "metrics.jsonl")) == [18]

    lines = done.stderr.partition("what next:\n")[2].splitlines()
    commands = [re.sub(r"^  ([\w ]+:)? +", "", line) for line in lines]
    birds = tmp_path / "runs" / "demo" / "birds"
    environment = main.environment() | {"HF_HUB_OFFLINE": "1"}  # the weights of the real run are not here

    def typed(command, **names):
        for name, value in names.items():
            assert name in command
            command = command.replace(name, shlex.quote(str(value)))
        return subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)

    curves, page, score, names, prepare, train = commands
    assert curves.endswith(" --logdir='runs/my demo'")
    assert re.match(r"2\.\d", typed(curves.partition(" --logdir")[0] + " --version_tb").stdout)
    assert typed(page).returncode == 0 and (run / "report.html").exists()
    assert json.loads(typed(score).stdout) == {"step": 18, "selected_by": "val/accuracy", "test": results["test"]}
    photograph = next((birds / "archive" / "images").rglob("*.jpg"))
    assert typed(names, FOLDER=photograph.parent).returncode == 0 and (tmp_path / "birds.csv").exists()
    assert typed(prepare, NABIRDS_FOLDER=birds / "archive").returncode == 0
    fetching = typed(train)
    assert fetching.returncode == 1 and "could not be fetched from the Hugging Face Hub" in fetching.stderr


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


@pytest.fixture
def our_log():
    """Undoes what a command in this process does to the package's log."""
    log = logging.getLogger("vit_nabirds")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def exits(capfd, *arguments) -> tuple[int, str]:
    """Exit code and messages of a command in this process."""
    argv = sys.argv[:]
    code = cli.main(list(map(str, arguments)))
    assert sys.argv == argv
    return code, capfd.readouterr().err


def test_several_commands_in_one_process(our_log, tmp_path, capfd):
    draw_archive(tmp_path / "archive", species=2, train=2, test=1, size=(40, 60))
    assert cli.main(["help"]) == 0
    assert "usage: " in capfd.readouterr().out
    assert exits(capfd, "prepare") == (2, "error: prepare needs --archive and --out\n")
    sizes = ("--train_size=40", "--test_size=32")
    for out in ("one", "two"):  # flags of the first one are not left over
        assert exits(capfd, "prepare", f"--archive={tmp_path / 'archive'}", f"--out={tmp_path / out}", *sizes)[0] == 0
        assert (tmp_path / out / "metadata.parquet").exists()
        sizes = ()
    sides = [open_split(tmp_path / out, read_table(tmp_path / out), "train").size for out in ("one", "two")]
    assert sides == [40, 269]


USAGE = {  # and docs/mistakes.md: test_mistakes_of_users.py
    "field of another group": (["--config.learning_rate=1"], "did you mean --config.optimizer.learning_rate?"),
    "short name of the batch size": (["--config.bs=8"], "did you mean --config.batch_size?"),
    "short name of weight decay": (["--config.wd=0.1"], "did you mean --config.optimizer.weight_decay?"),
    "a nested field without its prefix": (["--learning_rate=3"], "did you mean --config.optimizer.learning_rate?"),
    "a field that we do not have": (
        ["--config.focal_gamma=2"],
        "--config.focal_gamma: there is no field 'focal_gamma'; `train --help` lists all fields.",
    ),
    "None for a number": (["--config.optimizer.clip_norm=None"], "clip_norm is 'None': it must be 0 or more, and at"),
    "half of a name": (["--config.clip=1"], "there is no field 'clip'; did you mean --config.optimizer.clip_norm?"),
    "a part of a field": (["--config.optimizer.name.x=1"], "config.optimizer.name is a field and has no parts"),
    "a value that moves the cursor": (["--config.seed=\x1b[2J"], r"config.seed is '\x1b[2J': it must be between 0 and"),
    "fraction for a whole number": (["--config.batch_size=1.5"], "config.batch_size"),
    "empty file name": (["--config="], "the configuration file '' cannot be read"),
    "file name with a space": (["--config=my file.py"], "the configuration file 'my file.py' cannot be read"),
    "no data": (["--config.data.root=", "--config.data.synthetic=False"], "config.data.root is empty"),
    "workdir in a bucket": (["--workdir=gs://b/run"], "--workdir=gs://b/run is an address, and the program reads and"),
    "one slash": (["evaluate", "--workdir=s3:/b/run"], "--workdir=s3:/b/run is an address"),
    "weights with a scheme": (
        ["--config.model.pretrained=hf://a/b"],
        "--config.model.pretrained=hf://a/b is an address",
    ),
    "a signal that is none": (["--config.stop_signals=TERM,HUP"], "'TERM,HUP': it must be out of TERM,INT,USR1,USR2"),
    "process of several": (["--coordinator=localhost:6000"], "needs --num_processes and --process_id too"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line_and_exits_with_2(our_log, tmp_path, monkeypatch, capfd, case):
    arguments, message = USAGE[case]
    monkeypatch.chdir(tmp_path)
    code, said = exits(capfd, *arguments)
    assert code == 2 and said.startswith("error: ") and message in said and len(said.splitlines()) == 1, said
    assert not any(tmp_path.iterdir())


def test_the_exit_code_of_the_process_is_that_of_the_command(main):
    done = main("trian")
    assert done.returncode == 2
    assert done.stderr == f"error: there is no command 'trian': it is one of {', '.join(cli.COMMANDS)}, help\n"


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
        ("config.optimizer.lerning_rate = 1.0", "did you mean --config.optimizer.learning_rate?"),
        ("config.batch_size = 'many'", "batch_size"),
        ("config.nothing.here = 1", "there is no field 'nothing'"),
        ("raise ValueError('it rains')", "ValueError: it rains"),
        ("a b", "SyntaxError"),
    ],
)
def test_a_mistake_in_a_configuration_file(our_log, tmp_path, capfd, line, message):
    file = tmp_path / "mine.py"
    file.write_text(CONFIG.format(line=line))
    code, said = exits(capfd, f"--config={file}")
    assert code == 2 and message in said and "mine.py" in said and len(said.splitlines()) == 1, said


def test_a_fault_of_the_program_keeps_its_traceback(main, our_log, tmp_path):
    with at("steps 0 to 20", crash), pytest.raises(RuntimeError, match="died"):
        cli.main([*main.tiny, f"--workdir={tmp_path / 'run'}"])


def test_prepare(main, tmp_path):
    draw_archive(tmp_path / "archive", species=2, train=2, test=1, size=(40, 60))
    done = main("prepare", "--archive=archive", "--out=out", "--train_size=40", "--test_size=32")
    assert done.returncode == 0 and "6 photographs (4 train, 2 test), 2 species" in done.stdout
    assert open_split(tmp_path / "out", read_table(tmp_path / "out"), "train").size == 40
    assert main("prepare", "--archive=archive", "--out=table", "--metadata_only").returncode == 0
    assert (tmp_path / "table" / "metadata.parquet").exists() and not (tmp_path / "table" / "cleaned_images").exists()


@pytest.mark.parametrize("asked", ["help", "--help", "-h"])
def test_help_lists_the_commands(main, asked):
    done = main(asked)
    assert done.returncode == 0 and "--config.seed" not in done.stdout
    assert all(f"\n  {command} " in done.stdout for command in cli.COMMANDS)
    assert "75 stopped on request" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_lists_its_flags(our_log, capfd, command):
    assert cli.main([command, "--help"]) == 0
    shown = capfd.readouterr().out
    flags = {"train": "workdir", "prepare": "archive", "evaluate": "step", "predict": "images", "export": "out"}
    flags |= {"check": "gpus", "probe": "learning_rates", "sweep": "set", "compare": "where", "report": "compare"}
    assert f"\n  --{flags.get(command, 'checkpoint')} " in shown and "Exit codes: " in shown


def test_help_of_train_lists_every_field_with_its_meaning(our_log, capfd):
    assert cli.main(["train", "--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    for name, field in fields():
        shown = [line for line in lines if line.startswith(f"  --config.{name}=")]
        assert len(shown) == 1 and field.metadata["meaning"] and shown[0].endswith(field.metadata["meaning"])
    assert "  --config.optimizer.learning_rate=0.0001 " in "\n".join(lines)


def test_nobody_reads_on(main):
    """As in `help | head -1`, whose pipe is closed before all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, REPOSITORY / "main.py", "help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 0
    piped = f"set -o pipefail; {shlex.join(map(str, command))} | head -1"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == "" and done.returncode == 0


@pytest.mark.parametrize("options", [["-S"], ["-I", "-S"]])  # without packages, and without the checkout too
def test_a_python_without_the_packages_is_one_line(tmp_path, options):
    done = subprocess.run(
        [sys.executable, *options, REPOSITORY / "main.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(r"error: the package '\w+' is not installed in /.*: use an environment that has it", done.stderr)


def test_a_full_disk_is_one_message():
    from vit_nabirds.errors import message_of

    # What Orbax raises of it; a real full disk needs the right to mount one.
    error = ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']")
    assert message_of(error).startswith("No space left on device: make room, and run the same command again")


def test_full_memory_of_a_device_is_one_message():
    from vit_nabirds.errors import message_of

    # What XLA raises of it; the lines that follow list buffers.
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nBuffers: …")
    said = message_of(error)
    assert said.startswith(
        "a device's memory is full (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 171798"
    )
    assert "--config.microbatch=-1" in said and "Buffers" not in said and exit_code_of(error) == 1


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("x"), 1),
        (ConfigError("x"), 2),
        (ZeroDivisionError(), 1),
        (OSError(errno.ENOENT, "x"), 1),
        (OSError(errno.EFBIG, "x"), 1),
        (OSError(errno.ESTALE, "Stale file handle"), 74),
        (OSError(errno.ENOSPC, "x"), 74),
        (ValueError("Error writing local file: No space left on device [os_error_code='28']"), 74),
        (ValueError("UNKNOWN: Error writing [os_error_code='5']"), 74),
        (ValueError("DEADLINE_EXCEEDED: Error writing [os_error_code='110']"), 74),
        (ValueError("NOT_FOUND: Error opening [os_error_code='2']"), 1),
        (MemoryError(), 74),
        (RuntimeError("can't start new thread"), 74),
        (RuntimeError("INTERNAL: CUDA error: an uncorrectable ECC error"), 74),
        (RuntimeError("Unable to initialize backend 'cuda': INTERNAL: no supported devices found"), 74),
        (RuntimeError("Unable to initialize backend 'tpuu': Backend 'tpuu' is not in the list"), 1),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), 74),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), 1),
    ],
)
def test_what_may_be_gone_later_has_its_exit_code(error, code):
    assert exit_code_of(error) == code
