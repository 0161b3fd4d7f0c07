"""A training whose disk is full for a while: on a real file system."""

import re
import sys

from tiny_runs import losses, steps_of, with_own_mounts

MOUNTED = """
set -e
mount -t tmpfs -o size=40m tmpfs "$1"
"$3" -c "$4"
[ "$(echo "$1"/run/*)" = "$1/run/*" ] || cp -r "$1/run" "$2"
"""
TRAIN = """
from pathlib import Path
import tiny_runs
from tiny_config import get_config
from vit_nabirds import cli
from vit_nabirds.training import saver
saver.AGAIN, saver.LAST_TRIES = 0.05, (0.1, 0.1)
config, top = get_config(), Path({top!r})
config.data.root, config.evaluate.every, config.checkpoint.every = {data!r}, "20 steps", "5 steps"
filler = top / "filler"

def fill():
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass

cli.log_to_stderr()
try:
    with tiny_runs.at("step 12/20", fill), tiny_runs.at({until!r}, filler.unlink):
        tiny_runs.train(config, top / "run")
except AssertionError:
    pass  # it has not been mended
except Exception as error:
    print("raised", error.exit_code, error)
"""


def trained(prepared, tmp_path, until: str) -> str:
    """What a training says whose disk is full at step 12, until a line with this text is logged. Its workdir, as far as
    it can be read, is `tmp_path / "run"` then."""
    (top := tmp_path / "mounted").mkdir()
    code = TRAIN.format(top=str(top), data=str(prepared), until=until)
    done = with_own_mounts(MOUNTED, top, tmp_path, sys.executable, code)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_a_save_that_fails_is_tried_again_and_the_training_goes_on(prepared, undisturbed, tmp_path):
    said = trained(prepared, tmp_path, until="step 18/20")
    assert re.search(r"the checkpoint of step 1[05] could not be written \(No space left on device\)", said), said
    assert "finished" in said
    run = tmp_path / "run"
    assert losses(run) == losses(undisturbed)
    assert 20 in steps_of(run) and (run / "results.json").exists()


def test_a_run_whose_last_state_cannot_be_saved_does_not_end_well(prepared, tmp_path):
    said = trained(prepared, tmp_path, until="never")
    assert "raised 74 step 20, the last, could not be saved: make room" in said, said
    assert steps_of(tmp_path / "run")[-1] in (5, 10)
