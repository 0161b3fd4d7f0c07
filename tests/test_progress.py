"""The panel of a training on a terminal, and the lines that stand in for it elsewhere."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pyte
import pytest
from conftest import REPOSITORY

from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.runs.progress import Progress
from vit_nabirds.runs.quantities import in_words, time_in_words


class Screen:
    """What a terminal of 300 lines shows."""

    def __init__(self, output: str, width: int = 100) -> None:
        screen = pyte.Screen(width, 300)
        pyte.Stream(screen).feed(output)
        self.lines = [line.rstrip() for line in screen.display][: screen.cursor.y + 1]
        self.shows_cursor = not screen.cursor.hidden


def on_terminal(command: list, width: int = 100, **options) -> tuple[int, str]:
    """The exit code and the output of a command whose stderr is a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    with subprocess.Popen(list(map(str, command)), stdin=slave, stderr=slave, stdout=slave, **options) as process:
        os.close(slave)
        output = b""
        while True:
            try:
                output += (part := os.read(master, 2**16))
            except OSError:  # the other end is closed
                break
            if not part:
                break
    os.close(master)
    return process.returncode, output.decode(errors="replace")


SCRIPT = """
import logging, os, signal, sys, time, warnings
from pathlib import Path
from vit_nabirds import cli
from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import say
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.runs.trackers import RunInfo
cli.log_to_stderr()
plan = Plan.of(Config.read({"data": {"root": "birds"}, "batch_size": 8, "epochs": 4.0}), 40)
tracker = Tracker(RunInfo(Path(sys.argv[1]), "x", 0, {}), plan, (), True, lambda: 7)
for step in (1, 2):
    tracker.progress(step)
    tracker.scalars(step, {"train/loss": 0.23451, "train/accuracy": 0.9375, "train/images_per_second": 512.3})
    time.sleep(0.6)
logging.getLogger("vit_nabirds").warning("a warning that is much longer than the line " + 9 * "ä ")
print("somebody prints", file=sys.stderr)
say("said by a signal")
time.sleep(0.6)
if sys.argv[2] != "end":
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
tracker.close()
logging.getLogger("vit_nabirds").info("the end")
"""
LOGGED = ["step 1/20, epoch 0.20: loss 0.2345, accuracy 93.8 %, 512 images/s", "step 2/20, epoch 0.40: loss 0.2345"]
LOGGED += ["a warning that is much longer", "somebody prints", "said by a signal"]


@pytest.mark.parametrize("end", ["end", "SIGTERM", "SIGKILL"])
def test_lines_scroll_past_the_panel_which_leaves_the_terminal_as_it_was(tmp_path, end):
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    code, output = on_terminal([sys.executable, "-c", SCRIPT, tmp_path, end], env=environment)
    screen = Screen(output)
    text = "\n".join(screen.lines)
    assert screen.shows_cursor and all(line in text for line in LOGGED), text
    assert ("the end" in text) == (end == "end")
    if end == "end":
        assert code == 0 and "epoch 0.40 of 4" in output and "epoch 0.40 of 4" not in text
    else:
        assert code == -getattr(signal, end)
        last = text[text.index("said by a signal") :].splitlines()  # the panel, and the next prompt below
        assert re.match(r"epoch 0\.40 of 4 .* step 2/20 +\d+ s left", last[2]) and screen.lines[-1] == ""
        assert (
            last[3:5] == ["loss 0.2345, accuracy 93.8 %, 512 images/s", last[4]] and "checkpoint of step 7" in last[4]
        )


@pytest.mark.parametrize("terminal", ["narrow", "ascii", "dumb"])
def test_terminals_that_can_do_less(tmp_path, terminal):
    environment = os.environ | {"TERM": "dumb" if terminal == "dumb" else "xterm", "PYTHONPATH": str(REPOSITORY)}
    if terminal == "ascii":
        environment |= {"PYTHONIOENCODING": "ascii:backslashreplace", "LC_ALL": "C"}
    width = 30 if terminal == "narrow" else 100
    code, output = on_terminal([sys.executable, "-c", SCRIPT, tmp_path, "end"], width, env=environment)
    text = "".join(line.ljust(width) for line in Screen(output, width).lines)  # long lines go on below
    assert code == 0 and all(line in text for line in [*LOGGED, "the end"]) and "Traceback" not in text
    drawn = re.findall(r"epoch 0\.4[^\r\n]*", re.sub(r"\d\d step.*|\x1b\[\S*?m", "", output))
    assert bool(drawn) == (terminal != "dumb") and all(len(line) <= width for line in drawn)
    assert terminal != "ascii" or output.isascii()


def test_without_a_terminal_there_are_lines_alone(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "end"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0 and "\x1b" not in done.stderr and len(done.stderr.splitlines()) == 6
    assert re.search(r"step 2/20, epoch 0.40: loss 0.2345, accuracy 93.8 %, 512 images/s, \d+ s left\n", done.stderr)


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(main, tmp_path):
    program = (REPOSITORY / "tests" / "conftest.py").read_text().partition('AT = """')[2].partition('"""')[0]
    command = [sys.executable, "-c", program, "terminate", "compiled in", "train", *main.tiny, "--workdir=a run"]
    code, output = on_terminal(command, 400, env=main.environment(2) | {"TERM": "xterm"}, cwd=tmp_path)
    text = "\n".join(Screen(output, 400).lines)
    assert code == 75, text
    assert "curves     " in text and "tensorboard --logdir='a run'" in text and "a run/metrics.jsonl" in text
    assert re.search(
        r"stopped at step 1 of 20, all saved in a run/checkpoints/1, \d.* s after the signal: run the", text
    )
    assert re.search(r"to go on:  .* train --config=\S+ \S+ '--workdir=a run'", text)


def test_the_time_left_is_that_at_the_mean_speed_since_the_first_step():
    now = [100.0]
    plan = Plan.of(Config.read({"data": {"root": "birds"}, "batch_size": 8, "epochs": 4.0}), 40)
    progress = Progress(plan, 4, lambda: None, clock=lambda: now[0])
    assert progress.left == ""
    progress.step(5)  # which has waited for the compilation
    assert progress.left == ""
    now[0] += 120
    progress.step(8)
    assert progress.left == "8 min left"
    progress.step(20)
    assert progress.left == ""


def test_numbers_have_units_and_sensible_digits():
    values = {"loss": 1.05512, "accuracy": 0.76666, "top5_accuracy": 1.0, "examples": 24633, "mistake_distance": 4.0}
    assert in_words({f"val/{name}": value for name, value in values.items()}) == (
        "validation: loss 1.0551, accuracy 76.7 %, top-5 accuracy 100.0 %, 24,633 photographs, mistake distance 4.00"
    )
    speeds = {"train/images_per_second": 2908.4, "train/input_wait": 0.0049, "train/mfu": 0.412, "train/memory_gib": 8}
    assert in_words(speeds) == "2,908 images/s, input wait 0.5 %, MFU 41.2 %, memory 8.00 GiB"
    assert in_words({"train/learning_rate": 2.96e-05, "train/gradient_norm": 101.5, "train/new_thing": 1.23456}) == (
        "learning rate 2.96e-05, gradient norm 102, new thing 1.235"
    )
    times = {0.4: "0 s", 61: "1 min 1 s", 4320: "1 h 12 min", 3599.7: "1 h", 180_000: "2 d 2 h"}
    assert {seconds: time_in_words(seconds) for seconds in times} == times


def test_other_commands_show_a_bar_on_a_terminal_alone(tmp_path):
    script = (
        "import logging, time\nfrom vit_nabirds import cli\nfrom vit_nabirds.terminal import progress\n"
        "cli.log_to_stderr()\n"
        "for i in progress(range(4), 4, 'images', 'cropping'):\n"
        "    time.sleep(0.4)\n    logging.getLogger('vit_nabirds').info('image %d', i)\n"
    )
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    code, output = on_terminal([sys.executable, "-c", script], env=environment)
    assert code == 0 and re.search(r"cropping .*2/4.* images/s", re.sub(r"\x1b\[\S*?m", "", output))
    assert [line[9:] for line in Screen(output).lines if line] == [f"image {i}" for i in range(4)]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert [line[9:] for line in done.stderr.splitlines()] == [f"image {i}" for i in range(4)] and not done.stdout
