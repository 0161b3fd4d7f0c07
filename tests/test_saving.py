"""Checkpoints: what other tools read in them, what saving costs the process, and what an error is called."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from tiny_runs import metadata_of, prepared_run

from vit_nabirds.errors import UserError
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.parallel import devices
from vit_nabirds.runs import checkpoints
from vit_nabirds.runs.checkpoints import Checkpoints, Metadata, digest, existing, placed
from vit_nabirds.runs.loading import open_run
from vit_nabirds.runs.selection import Selection

METADATA = Metadata({}, {}, ["wren"], Normalization(), "data")


def save(folder: Path, step: int, parts: dict, metadata: Metadata = METADATA) -> None:
    with contextlib.closing(Checkpoints(folder)) as saved:
        saved.save(step, parts, digest(parts), metadata)


def restore(folder: Path, step: int, like: dict) -> dict:
    with contextlib.closing(Checkpoints(folder, read_only=True)) as saved:
        return saved.restore(step, like)


def test_three_lines_of_orbax_read_every_parameter(undisturbed):
    params = ocp.load_checkpointables(undisturbed / "checkpoints" / "20")["params"]
    ours = open_run(undisturbed, 20).params
    assert params.keys() == ours.keys() and "encoder/layers/1/attn/query/kernel" in params
    assert all(np.array_equal(params[path], ours[path]) for path in ours)


def test_the_newest_and_the_best_checkpoints_are_kept_and_describe_themselves(undisturbed):
    steps, metadata = existing(undisturbed / "checkpoints")
    best = Selection.read(undisturbed, [], "val/accuracy").best([5, 10, 15, 20])
    assert set(steps) == {15, 20, best}
    assert len(metadata.species) == 4 and metadata.architecture["hidden_size"] == 16
    assert metadata.config["batch_size"] == 8 and metadata.normalization.mean == (0.5, 0.5, 0.5)
    assert metadata.fingerprint


def test_parts_come_back_bit_by_bit_and_alone_where_they_are_wanted(undisturbed, tiny_config, tmp_path):
    run = prepared_run(tiny_config, undisturbed)
    state = run.first_state(run.pretrained_params())
    parts = state.parts(run.saved)
    save(tmp_path, 3, parts)
    sharding = devices.replicated(run.mesh)
    restored = restore(tmp_path, 3, placed(jax.eval_shape(lambda: parts), sharding))
    again = state.with_parts(restored)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and ours.sharding == sharding
    alone = restore(tmp_path, 3, placed({"params": run.model.shapes}, sharding))
    assert alone.keys() == {"params"} and alone["params"].keys() == parts["params"].keys()


def test_a_checkpoint_keeps_and_changes_shardings(tmp_path):
    """Sharded over two devices, it is restored on one, and the other way round."""
    mesh = devices.make_mesh()
    split, whole = devices.over_batch(mesh), jax.sharding.SingleDeviceSharding(jax.devices()[1])
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    for step, (saved, wanted) in enumerate([(split, whole), (whole, split)]):
        parts = {"params": {"a/kernel": jax.device_put(values, saved)}}
        save(tmp_path, step, parts)
        restored = restore(tmp_path, step, placed(jax.eval_shape(lambda: parts), wanted))["params"]["a/kernel"]  # noqa: B023
        assert np.array_equal(restored, values) and restored.sharding == wanted


@pytest.mark.parametrize("change", ["added", "removed", "shape", "dtype"])
def test_other_arrays_than_the_saved_ones_are_another_version(undisturbed, change):
    shapes = dict(open_run(undisturbed, 20).model.shapes)
    bias = shapes["classifier/bias"]
    if change == "removed":
        del shapes["classifier/bias"]
    elif change == "added":
        shapes["classifier/other"] = bias
    else:
        shape, dtype = ((5,), bias.dtype) if change == "shape" else (bias.shape, jnp.bfloat16)
        shapes["classifier/bias"] = jax.ShapeDtypeStruct(shape, dtype)
    like = placed({"params": shapes}, devices.replicated(devices.make_mesh()))
    with pytest.raises(UserError, match="checkpoints/20 was written by another version of this program"):
        restore(undisturbed / "checkpoints", 20, like)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_the_sums_are_the_same_on_the_host_and_on_devices(dtype):
    draw = np.random.default_rng(0)
    drawn = (100 * draw.standard_normal((7, 5))).astype("int32" if "int" in dtype else "float32")
    found = []
    for values in (drawn, drawn[::-1], drawn[:1, :1].reshape(()), drawn[:0]):
        array = jnp.asarray(values).astype(dtype)
        on_host = checkpoints._sums(np.asarray(array))
        on_device = checkpoints._sums_on_device(array)
        assert [int(x) for x in on_host] == [int(x) for x in on_device]
        words = np.frombuffer(np.asarray(array).tobytes(), f"uint{8 * array.dtype.itemsize}").tolist()
        expected = sum(words), sum(word * (2 * place + 1) for place, word in enumerate(words))
        assert [int(x) for x in on_host] == [*(total % 2**32 for total in expected), 1]
        found.append(tuple(map(int, on_host[:2])))
    assert len(set(found)) == 4 and found[0][0] == found[1][0]  # the weighted sum alone sees the order


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_sums_find_what_is_not_finite(value):
    array = jnp.ones((3, 4)).at[1, 2].set(value)
    assert not checkpoints._sums(np.asarray(array))[2] and checkpoints._sums_on_device(array)[2] == 0
    assert not digest({"params": {"x": array}})["params"]["x"].is_finite


def bytes_on_devices() -> int:
    """Of all live arrays; a buffer that several of them share counts once."""
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


def test_a_save_makes_no_second_copy_of_the_state_on_the_devices(tmp_path):
    """Sampled in whatever thread, as often as it calls a function of JAX's or Orbax's arrays."""
    sharding = devices.replicated(devices.make_mesh())
    params = jax.jit(
        lambda: {f"{i}/kernel": jnp.full((256, 256), i, jnp.float32) for i in range(4)}, out_shardings=sharding
    )
    parts = {"params": params()}
    digests, samples, lock = digest(parts), [], threading.Lock()

    def sample(frame, event, _argument):
        if event == "return" and "array" in frame.f_code.co_filename and lock.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # deleted by another thread meanwhile
                samples.append(bytes_on_devices())
            lock.release()

    with contextlib.closing(Checkpoints(tmp_path)) as saved:
        before = bytes_on_devices()
        assert before >= 2 * 4 * 2**18
        threading.setprofile(sample)
        sys.setprofile(sample)
        try:
            saved.save(1, parts, digests, METADATA)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert len(samples) > 20
    assert max(samples) <= before + 4096


# In a process of its own: the limit on open files is the process's.
MANY_SAVES = """
import contextlib, os, resource, sys, threading
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import jax.numpy as jnp
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.runs.checkpoints import Checkpoints, Metadata, digest
metadata = Metadata({}, {}, ["wren"], Normalization(), "data")
parts = {"params": {"kernel": jnp.ones(8)}, "training": {"step": jnp.zeros((), jnp.int32)}}
used = {}
with contextlib.closing(Checkpoints(Path(sys.argv[1]))) as checkpoints:
    for step in range(1, 401):
        checkpoints.save(step, parts, digest(parts), metadata)
        used[step] = len(os.listdir("/proc/self/fd")), threading.active_count()
early, late = (list(map(min, zip(*(used[step] for step in steps)))) for steps in (range(11, 31), range(381, 401)))
print(*early, *late)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_four_hundred_saves_take_no_more_descriptors_and_threads_than_twenty(tmp_path):
    done = subprocess.run([sys.executable, "-c", MANY_SAVES, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files, threads, files_late, threads_late = map(int, done.stdout.split())
    assert files_late < files + 20 and threads_late < threads + 20  # one left by each save would make 370


@pytest.fixture
def open_folder():
    """A folder that every user of the machine may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone can become another user")
@pytest.mark.parametrize("part", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/d", "params", "."])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(undisturbed, open_folder, part):
    import grp  # noqa: F401 (Orbax imports it to describe what it may not read)
    import pwd  # noqa: F401

    folder = open_folder / "checkpoints"
    parts = {"params": {"kernel": jnp.ones(8)}, "training": {"step": jnp.zeros((), jnp.int32)}}
    for step in (1, 2):
        save(folder, step, parts, metadata_of(undisturbed))
    like = placed(jax.eval_shape(lambda: parts), devices.replicated(devices.make_mesh()))

    def read():
        assert existing(folder)[1].config["batch_size"] == 8
        return restore(folder, 2, like)

    assert read()["params"]["kernel"].sum() == 8
    (folder / "2" / part).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises((UserError, PermissionError), match="Permission denied"):
            read()
    finally:
        os.seteuid(0)


def test_a_changed_bit_is_found_in_every_part(undisturbed, tiny_config, tmp_path):
    run = prepared_run(tiny_config, undisturbed)
    like = run.state_shapes().parts(run.saved)
    for part in ("params", "training"):
        folder = shutil.copytree(undisturbed / "checkpoints", tmp_path / part)
        assert restore(folder, 20, like).keys() == {"params", "training"}
        file = max((folder / "20" / part).rglob("d/*"), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match="20 is damaged: delete that folder"):
            restore(folder, 20, like)
    assert metadata_of(undisturbed).species
