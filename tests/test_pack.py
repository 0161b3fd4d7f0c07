"""Packed images: the same batches as from the image files, also after an interruption; clear errors."""

import collections
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_data import same, shard_of, take

from vit_nabirds.data import batches, images, pack, photographs, prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import UserError
from vit_nabirds.parallel import locks

SIZES = {"train_size": 20, "test_size": 16}


@pytest.fixture(scope="module")
def packed(prepared, tmp_path_factory) -> Path:
    """A packed folder without its images, as it is copied to a node's disk."""
    folder = tmp_path_factory.mktemp("packed") / "birds"
    shutil.copytree(prepared, folder)
    pack.pack(folder)
    shutil.rmtree(folder / "cleaned_images")
    return folder


@pytest.fixture
def copied(packed, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(packed, tmp_path / "copied")


@pytest.fixture
def archive(tmp_path) -> Path:
    draw_archive(tmp_path / "archive", species=2, train=6, test=3, size=(40, 60))
    return tmp_path / "archive"


def open_split(root, split="train"):
    return photographs.open_split(root, read_table(root), split)


def images_of(split):
    images = np.empty((len(split), split.size, split.size, 3), np.uint8)
    for index, image in enumerate(images):
        split.read(index, image)
    return images


def contents(folder):
    return {file.name: file.read_bytes() for file in (folder / "packed").iterdir() if file.name != "lock"}


def evaluated(root, hosts, workers):
    split = open_split(root, "test")
    return [batch for host in range(hosts) for batch in batches.eval_batches(split, 8, workers, shard_of(host, hosts))]


@pytest.mark.parametrize("hosts, start, workers", [(1, 0, 0), (4, 3, 0), (2, 7, 2)])
def test_batches_equal_those_of_the_image_files(packed, prepared, hosts, start, workers):
    assert open_split(packed).is_packed and not open_split(prepared).is_packed
    expected = take(open_split(prepared), 6, start=start)
    actual = take(open_split(packed), 6, hosts, start, workers)
    assert same(actual, expected) and actual[0]["image"].dtype == np.uint8
    expected, actual = evaluated(prepared, hosts, 0), evaluated(packed, hosts, workers)
    assert same(actual, expected) and sum(batch["mask"].sum() for batch in actual) == 15
    assert [batch.keys() for batch in actual] == [batch.keys() for batch in expected]


def test_the_files_are_plain_npy_in_the_order_of_the_table(packed, prepared):
    table = read_table(packed)
    index = pl.read_parquet(packed / "packed/index.parquet")
    assert index.drop("crc32").equals(table.select("path", "is_training_img")) and index["crc32"].dtype == pl.UInt32
    for name in ("train", "test"):
        packed_images = np.load(packed / "packed" / f"{name}.npy", mmap_mode="r")
        assert np.array_equal(packed_images, images_of(open_split(prepared, name)))
    assert sorted(contents(packed)) == ["index.parquet", "test.npy", "train.npy"]


def test_prepare_packs_once_and_leaves_no_stale_pack(archive, tmp_path, capsys):
    out = tmp_path / "p"
    with pytest.raises(UserError, match="--metadata_only leaves out"):
        prepare.prepare(archive, out, pack=True, metadata_only=True)
    prepare.prepare(archive, out, **SIZES)
    assert not (out / "packed").exists()
    prepare.prepare(archive, out, pack=True, **SIZES)
    output = capsys.readouterr().out
    assert "0 written, 18 already there" in output
    assert "packed: 12 train and 6 test images, 0.0 MB, written" in output
    before, ages = contents(out), {file: file.stat().st_mtime_ns for file in (out / "packed").iterdir()}
    for again in (True, False):
        prepare.prepare(archive, out, pack=again, **SIZES)
        assert contents(out) == before and {file: file.stat().st_mtime_ns for file in ages} == ages
    assert "MB, already there" in capsys.readouterr().out

    table = read_table(out)
    path = table["path"][0]
    photograph = archive / "images" / path
    shutil.copy(archive / "images" / table["path"][1], photograph)
    (out / "cleaned_images" / path).unlink()
    prepare.prepare(archive, out, **SIZES)
    assert not contents(out) and not open_split(out).is_packed
    prepare.prepare(archive, out, pack=True, **SIZES)
    assert contents(out).keys() == before.keys() and contents(out) != before

    photograph.write_bytes(b"")  # its image cannot be made again
    (out / "cleaned_images" / path).unlink()
    with pytest.raises(UserError, match="1 photographs cannot be used"):
        prepare.prepare(archive, out, pack=True, **SIZES)
    assert not contents(out)


def test_without_an_index_everything_is_packed_again(prepared, packed, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "p")
    shutil.copytree(packed / "packed", root / "packed")
    for file in (root / "packed").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    (root / "packed" / "index.parquet").unlink()
    pack.pack(root)
    assert contents(root) == contents(packed)


def test_a_folder_is_packed_by_one_process_at_a_time(prepared, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "p")
    (root / "packed").mkdir()
    with locks.lock(root / "packed" / "lock", "not this one"):
        with pytest.raises(UserError, match="another process packs .*/p right now"):
            pack.pack(root)
    pack.pack(root)


KILLED = """
import os, signal, sys
from vit_nabirds.data import images, pack

def kill_at(module, name, count):
    calls, function = iter(range(count)), getattr(module, name)
    def counted(*arguments):
        if next(calls) == count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    setattr(module, name, counted)

kill_at({"read": images.ImageFiles}.get(sys.argv[2], os), sys.argv[2], int(sys.argv[3]))
pack.pack(sys.argv[1])
"""


@pytest.mark.parametrize(
    "call, count, left",
    [
        ("read", 25, {"train.npy.partial"}),  # an image of 48 + 15
        ("fsync", 2, {"train.npy", "test.npy.partial"}),
        ("replace", 3, {"train.npy", "test.npy", "index.parquet.partial"}),
    ],
)
def test_a_rerun_after_kill_9_gives_what_an_undisturbed_run_gives(prepared, packed, tmp_path, call, count, left):
    root = shutil.copytree(prepared, tmp_path / "p")
    command = [sys.executable, "-c", KILLED, root, call, str(count)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | {"SLURM_CPUS_PER_TASK": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert contents(root).keys() == left and not open_split(root).is_packed
    pack.pack(root)
    assert contents(root) == contents(packed)


def test_a_full_disk_is_reported_before_and_while_packing(prepared, tmp_path, monkeypatch):
    root = shutil.copytree(prepared, tmp_path / "p")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(
        pack.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 48 * 20 * 20 * 3 + 15 * 16 * 16 * 3 - 1)
    )
    with pytest.raises(UserError, match=r"p/packed: packing needs 69,120 bytes, 69,119 are free"):
        pack.pack(root)
    assert not contents(root)
    monkeypatch.undo()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.os, "fsync", full)
    with pytest.raises(UserError, match=r"p/packed: .*No space left on device. Make room and run the command again"):
        pack.pack(root)
    assert not contents(root)


def rewrite_index(change):
    def damage(folder):
        change(pl.read_parquet(folder / "index.parquet")).write_parquet(folder / "index.parquet")

    return damage


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def save(array):
    return lambda folder: np.save(folder / "train.npy", array)


DAMAGES = {
    "no Parquet": (rewrite("index.parquet", lambda _: b"hello"), r"index.parquet is not a readable Parquet file"),
    "column missing": (
        rewrite_index(lambda table: table.drop("crc32")),
        r"index.parquet is not a readable Parquet file with path",
    ),
    "column's type": (
        rewrite_index(lambda table: table.cast({"crc32": pl.Int64})),
        r"index.parquet is not a .* with path",
    ),
    "other records": (rewrite_index(lambda table: table.head(20)), r"index.parquet does not list the training images"),
    "other order": (rewrite_index(lambda table: table.reverse()), r"index.parquet does not list the training images"),
    "file missing": (lambda folder: (folder / "train.npy").unlink(), r"train.npy cannot be read .*No such file"),
    "no .npy": (rewrite("train.npy", lambda data: b"hello" + data), r"train.npy cannot be read "),
    "header": (rewrite("train.npy", lambda data: data.replace(b")", b"(", 1)), r"train.npy cannot be read "),
    "empty": (rewrite("train.npy", lambda _: b""), r"train.npy cannot be read "),
    "type": (save(np.zeros((48, 20, 20, 3), np.int8)), r"train.npy cannot be read \(its header is not that of a pack"),
    "not images": (
        save(np.zeros((48, 20, 10, 3), np.uint8)),
        r"train.npy cannot be read \(it holds 48 images of 20 x 10, not",
    ),
    "count": (save(np.zeros((47, 20, 20, 3), np.uint8)), r"it holds 47 images of 20 x 20, not 48 square ones"),
    "truncated": (
        rewrite("train.npy", lambda data: data[:-1]),
        r"train.npy cannot be read \(it has 57727 bytes, not 57728",
    ),
    "too long": (
        rewrite("train.npy", lambda data: data + b"x"),
        r"train.npy cannot be read \(it has 57729 bytes, not 57728",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_pack_is_refused_and_packed_again(copied, packed, prepared, damage, message, capsys):
    damage(copied / "packed")
    with pytest.raises(UserError, match=message) as error:
        open_split(copied)
    assert f"delete {copied / 'packed'} and run `main.py prepare --pack` again" in str(error.value)
    shutil.copytree(prepared / "cleaned_images", copied / "cleaned_images")
    pack.pack(copied)
    assert contents(copied) == contents(packed)
    assert re.search(f"note: .*{message}.*; packing again", capsys.readouterr().out)


def test_a_pack_is_kept_if_it_cannot_be_read(copied):
    train, test = copied / "packed" / "train.npy", copied / "packed" / "test.npy"
    before = train.read_bytes()
    test.unlink()
    test.mkdir()
    with pytest.raises(UserError, match="test.npy cannot be read .*Is a directory"):
        pack.pack(copied)
    assert train.read_bytes() == before


def test_a_pack_of_other_metadata_is_refused(copied):
    table = pl.read_parquet(copied / "metadata.parquet")
    table.reverse().write_parquet(copied / "metadata.parquet")
    with pytest.raises(UserError, match="does not list the training images of metadata.parquet"):
        open_split(copied)


def test_a_pack_of_images_with_other_settings_is_refused(copied, prepared):
    other = (copied / "prepared.json").read_text().replace("0.2", "0.1")
    (copied / "prepared.json").write_text(other)
    with pytest.raises(UserError, match="index.parquet is of images made with other settings than "):
        open_split(copied)
    shutil.copytree(prepared / "cleaned_images", copied / "cleaned_images")
    pack.pack(copied)
    assert open_split(copied).is_packed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_is_an_error_that_names_the_image(copied, packed, prepared, workers):
    file = copied / "packed" / "train.npy"
    content = bytearray(file.read_bytes())
    content[128 + 7 * 1200 + 600] ^= 1
    file.write_bytes(content)
    split = open_split(copied)
    with pytest.raises(
        UserError, match=rf"train.npy is damaged: the image of {split.images.paths[7]} .*delete .*/packed and"
    ):
        take(split, 6, workers=workers)
    shutil.copytree(prepared / "cleaned_images", copied / "cleaned_images")
    pack.pack(copied)
    assert contents(copied) == contents(packed)


def test_each_process_checks_each_image_once(copied, monkeypatch):
    split, checks = open_split(copied), []
    monkeypatch.setattr(images.zlib, "crc32", lambda image, crc32=images.zlib.crc32: checks.append(0) or crc32(image))
    take(split, 12)  # two epochs
    assert len(checks) == 48


def test_a_file_that_is_cut_off_while_open_is_an_error(copied):
    split = open_split(copied)
    os.truncate(copied / "packed" / "train.npy", 128 + 47 * 1200 + 5)
    with pytest.raises(UserError, match=rf"train.npy ends inside the image of {split.images.paths[47]}: delete"):
        take(split, 6)
