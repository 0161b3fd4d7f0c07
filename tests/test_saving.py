"""Checkpoints over a long run and on bad storage: what saving costs the process, and what an error is called."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vit_nabirds.errors import UserError

# In a process of its own: the limit on open files is the process's.
MANY_SAVES = """
import contextlib, os, resource, sys, threading
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import jax.numpy as jnp
from vit_nabirds.runs import checkpoints as checkpoint
from vit_nabirds.models.normalization import Normalization
about = checkpoint.About({}, {}, ["wren"], Normalization(), "data")
state = {"step": jnp.zeros((), jnp.int32), "params": {"kernel": jnp.ones(8)}, "opt_state": {}}
used = {}
with contextlib.closing(checkpoint.Checkpoints(Path(sys.argv[1]))) as checkpoints:
    for step in range(1, 401):
        checkpoints.save(step, state, about)
        used[step] = len(os.listdir("/proc/self/fd")), threading.active_count()
early, late = (list(map(min, zip(*(used[step] for step in steps)))) for steps in (range(11, 31), range(381, 401)))
print(*early, *late)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_four_hundred_saves_take_no_more_descriptors_and_threads_than_twenty(tmp_path):
    done = subprocess.run([sys.executable, "-c", MANY_SAVES, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files, threads, files_late, threads_late = map(int, done.stdout.split())
    assert files_late <= files + 2 and threads_late <= threads + 2


@pytest.fixture
def open_folder():
    """A folder that every user of the machine may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone can become another user")
@pytest.mark.parametrize("part", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/d", "params", "."])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(open_folder, part):
    import grp  # noqa: F401 (Orbax imports it to describe what it may not read)
    import pwd  # noqa: F401

    import jax
    import jax.numpy as jnp

    from vit_nabirds.models.normalization import Normalization
    from vit_nabirds.parallel import devices
    from vit_nabirds.runs import checkpoints as checkpoint

    state = {"step": jnp.zeros((), jnp.int32), "params": {"kernel": jnp.ones(8)}, "opt_state": {}}
    checkpoints = checkpoint.Checkpoints(open_folder / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state, checkpoint.About({}, {}, ["wren"], Normalization(), "data"))
    checkpoints.close()
    like = checkpoint.placed(jax.eval_shape(lambda: state), devices.replicated(devices.make_mesh()))

    def restore():
        checkpoints = checkpoint.Checkpoints(open_folder / "checkpoints", read_only=True)
        checkpoints.about(2)
        return checkpoints.restore(2, like)

    assert restore()["params"]["kernel"].sum() == 8
    (open_folder / "checkpoints" / "2" / part).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises((UserError, PermissionError), match="Permission denied"):
            restore()
    finally:
        os.seteuid(0)
