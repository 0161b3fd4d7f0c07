"""What goes wrong on one process of several is said once, clearly and soon, and ends them all."""

import sys
import time

import pytest
from real_slurm import REPOSITORY, TINY

PYTHON_MAIN = f"{sys.executable} {REPOSITORY / 'main.py'} train {TINY} --start_timeout=10"
ON_RANK_1 = "[ $SLURM_PROCID = 1 ] &&"


def start(slurm, prepared, workdir, script, nodes=2):
    """Two tasks that run a script in which $TRAIN starts the training; its messages, without those of srun."""
    training = f"{PYTHON_MAIN} --config.data.root={prepared} --workdir={workdir}"
    began = time.monotonic()
    run = slurm.srun(nodes, 2, "bash", "-c", script.replace("$TRAIN", training))
    assert time.monotonic() - began < 60
    lines = [line for line in run.stderr.splitlines() if not line.startswith(("srun: ", "[Gloo]"))]
    return run.returncode, lines


@pytest.mark.parametrize(
    "script, message",
    [
        ("$TRAIN --config.seed=$SLURM_PROCID", "process 1 of 2 on 127.0.0.2: the configuration differs from that of "
         "process 0: config.seed is 1 here and 0 there."),
        (f"{ON_RANK_1} export PYTHONPATH=$PWD/other; $TRAIN", "process 1 of 2 on 127.0.0.2: the environment differs "
         "from that of process 0: optax is '0.0.1' here and "),
        (f"{ON_RANK_1} exit 1; $TRAIN", "of 2 processes, 1 did not come to process 0 on 127.0.0.1, port "),
        ("[ $SLURM_PROCID = 0 ] && exit 1; $TRAIN", "127.0.0.2 got no answer from process 0 at 127.0.0.1:"),
        (f"{ON_RANK_1} NAME=--coordinator=node-of-nowhere.invalid:6000; $TRAIN $NAME", "127.0.0.2 cannot resolve "
         "'node-of-nowhere.invalid', the host of process 0: give an address that all nodes can reach with "
         "--coordinator=ADDRESS:PORT."),
        (f"{ON_RANK_1} DATA=--config.data.root=$PWD/copy; $TRAIN $DATA", "process 1 of 2 on 127.0.0.2: "),
        ("$TRAIN --config.batch_size=9", "config.batch_size is 9, which 2 devices cannot share equally"),
        (f"{ON_RANK_1} cd $PWD/elsewhere; $TRAIN --workdir=run", "is not the same folder on all nodes"),
    ],
    ids=["configuration", "package", "death in start-up", "no coordinator", "no such host", "data", "batch", "workdir"],
)  # fmt: skip
def test_one_message_and_exit_code_1(slurm, prepared, tmp_path, monkeypatch, script, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other" / "optax-0.0.1.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "optax-0.0.1.dist-info" / "METADATA").write_text("Name: optax\nVersion: 0.0.1\n")
    (tmp_path / "elsewhere").mkdir()
    code, lines = start(slurm, prepared, tmp_path / "run", script)
    assert code == 1
    errors = [line for line in lines if line.startswith("error: ")]
    assert message in errors[0], lines
    assert len(lines) == len(errors) <= 2, lines  # process 0 may add that one is missing
    assert not (tmp_path / "run").exists()


def test_a_wrong_flag_is_told_once(slurm, prepared, tmp_path):
    code, lines = start(slurm, prepared, tmp_path / "run", "$TRAIN --config.optimiser=adamw")
    assert code == 2 and len(lines) == 1 and "did you mean 'optimizer" in lines[0]


def test_a_process_that_is_killed_ends_the_others_with_a_word(slurm, prepared, tmp_path):
    script = f"{ON_RANK_1} (sleep 14; pkill -9 -f {tmp_path}.*SECOND) & "
    script += f"{ON_RANK_1} NAME=--config.data.workers=-1; $TRAIN --config.epochs=4000 $NAME"
    code, lines = start(slurm, prepared, tmp_path / "run", script)
    assert code == 137
