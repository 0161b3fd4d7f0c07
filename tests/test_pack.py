"""Packed images: the same batches as from the folder, whatever interrupts the packing; clear errors."""

import collections
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_data import same, take

from vit_nabirds.data import batches as data
from vit_nabirds.data import images, pack, prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.errors import UserError
from vit_nabirds.parallel import locks

SIZES = {"train_size": 20, "test_size": 16}


@pytest.fixture(scope="module")
def packed(prepared, tmp_path_factory) -> Path:
    """What a node's disk gets of a packed folder: no images."""
    folder = tmp_path_factory.mktemp("packed") / "birds"
    shutil.copytree(prepared, folder)
    pack.pack(folder)
    shutil.rmtree(folder / "cleaned_images")
    return folder


@pytest.fixture
def copied(packed, tmp_path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(packed, tmp_path / "copied")


@pytest.fixture
def archive(tmp_path) -> Path:
    draw_archive(tmp_path / "archive", species=2, train=6, test=3, size=(40, 60))
    return tmp_path / "archive"


def open_split(root, train=True):
    return data.open_split(root, data.read_table(root), train)


def contents(folder):
    return {file.name: file.read_bytes() for file in (folder / "packed").iterdir() if file.name != "lock"}


def evaluated(root, hosts, workers):
    split = open_split(root, train=False)
    shards = [data.grain.sharding.ShardOptions(host, hosts, drop_remainder=True) for host in range(hosts)]
    return [batch for shard in shards for batch in data.test_batches(split, 8, workers, shard)]


@pytest.mark.parametrize("hosts, start, workers", [(1, 0, 0), (4, 3, 0), (2, 7, 2)])
def test_batches_are_those_of_the_folder(packed, prepared, hosts, start, workers):
    assert open_split(packed).is_packed and not open_split(prepared).is_packed
    expected = take(open_split(prepared), 6, start=start)
    batches = take(open_split(packed), 6, hosts, start, workers)
    assert same(batches, expected) and batches[0]["image"].dtype == np.uint8
    expected, batches = evaluated(prepared, hosts, 0), evaluated(packed, hosts, workers)
    assert same(batches, expected) and sum(batch["mask"].sum() for batch in batches) == 15
    assert [batch.keys() for batch in batches] == [batch.keys() for batch in expected]


def test_the_files_are_plain_npy_in_the_order_of_the_table(packed, prepared):
    table = data.read_table(packed)
    index = pl.read_parquet(packed / "packed/index.parquet")
    assert index.drop("crc32").equals(table.select("path", "is_training_img")) and index["crc32"].dtype == pl.UInt32
    for name, train in (("train.npy", True), ("test.npy", False)):
        packed_images = np.load(packed / "packed" / name, mmap_mode="r")
        split = open_split(prepared, train)
        assert np.array_equal(packed_images, split.read(np.arange(len(split)))["image"])
    assert sorted(contents(packed)) == ["index.parquet", "test.npy", "train.npy"]


def test_prepare_packs_once_and_never_leaves_a_stale_pack(archive, tmp_path, capsys):
    out = tmp_path / "p"
    with pytest.raises(UserError, match="--metadata_only leaves out"):
        prepare.prepare(archive, out, pack=True, metadata_only=True)
    prepare.prepare(archive, out, **SIZES)
    assert not (out / "packed").exists()
    prepare.prepare(archive, out, pack=True, **SIZES)
    told = capsys.readouterr().out
    assert "0 written, 18 already there" in told and "packed: 12 train and 6 test images, 0.0 MB, written" in told
    before, ages = contents(out), {file: file.stat().st_mtime_ns for file in (out / "packed").iterdir()}
    for again in (True, False):
        prepare.prepare(archive, out, pack=again, **SIZES)
        assert contents(out) == before and {file: file.stat().st_mtime_ns for file in ages} == ages
    assert "MB, already there" in capsys.readouterr().out

    table = data.read_table(out)
    path = table["path"][0]
    photograph = archive / "images" / path
    shutil.copy(archive / "images" / table["path"][1], photograph)
    (out / "cleaned_images" / path).unlink()
    prepare.prepare(archive, out, **SIZES)
    assert not contents(out) and not open_split(out).is_packed
    prepare.prepare(archive, out, pack=True, **SIZES)
    assert contents(out).keys() == before.keys() and contents(out) != before

    photograph.write_bytes(b"")  # an image is about to be made, and cannot be
    (out / "cleaned_images" / path).unlink()
    with pytest.raises(UserError, match="1 photographs cannot be used"):
        prepare.prepare(archive, out, pack=True, **SIZES)
    assert not contents(out)


def count_reads(monkeypatch) -> collections.Counter:
    counts, read = collections.Counter(), images.ImageFiles.read

    def counted(self, index, out):
        counts[self.paths[index]] += 1
        read(self, index, out)

    monkeypatch.setattr(images.ImageFiles, "read", counted)
    return counts


def test_packing_goes_on_after_the_last_whole_image(prepared, packed, tmp_path, monkeypatch):
    root = shutil.copytree(prepared, tmp_path / "p")
    folder, whole = root / "packed", contents(packed)
    folder.mkdir()
    header, image = 128, 20 * 20 * 3
    images_of = [whole["train.npy"][at : at + image] for at in range(header, header + 40 * image, image)]
    checksums = [zlib.crc32(one).to_bytes(4, "little") for one in images_of]
    part = whole["train.npy"][: header + 25 * image]
    counts = count_reads(monkeypatch)

    def packed_again(train: bytes, told: list[bytes]) -> int:
        """The images that are read for it."""
        for file in folder.iterdir():
            file.unlink()
        (folder / "train.npy.tmp").write_bytes(train)
        (folder / "train.npy.crc32").write_bytes(b"".join(told))
        counts.clear()
        pack.pack(root)
        assert contents(root) == whole and set(counts.values()) == {1}
        return len(counts) - 15  # the test images

    assert packed_again(part + images_of[25][:600], checksums[:25]) == 15
    assert packed_again(part + images_of[25], checksums[:25] + [b"12"]) == 15
    assert packed_again(part, checksums[:30]) == 15  # the disk has lost some
    assert packed_again(whole["train.npy"], checksums) == 0
    assert packed_again(whole["train.npy"] + b"x", checksums) == 0
    assert packed_again(part[: -10 * image] + bytes(10 * image), checksums[:25]) == 25
    assert packed_again(part, []) == 40
    assert packed_again(whole["test.npy"], checksums) == 40


def test_files_without_an_index_are_packed_anew(prepared, packed, tmp_path):
    """For nothing says that they are what was written."""
    root = shutil.copytree(prepared, tmp_path / "p")
    shutil.copytree(packed / "packed", root / "packed")
    for file in (root / "packed").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-100] + bytes(100))
    (root / "packed" / "index.parquet").unlink()
    pack.pack(root)
    assert contents(root) == contents(packed)


def test_two_do_not_pack_one_folder_at_a_time(prepared, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "p")
    (root / "packed").mkdir()
    with locks.lock(root / "packed" / "lock", "not this one"):
        with pytest.raises(UserError, match="another process packs .*/p right now"):
            pack.pack(root)
    pack.pack(root)


def test_kill_9_and_a_rerun_give_what_an_undisturbed_run_gives(tmp_path):
    draw_archive(tmp_path / "archive", species=3, train=60, test=40)
    out, size = tmp_path / "p", {"train_size": 512, "test_size": 512}
    prepare.prepare(tmp_path / "archive", out, **size)
    command = [sys.executable, "-c", "import sys; from vit_nabirds.data.pack import pack; pack(sys.argv[1])", out]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=os.environ | {"SLURM_CPUS_PER_TASK": "1"})
    partial, deadline = out / "packed" / "train.npy.tmp", time.monotonic() + 60
    while not partial.exists() or partial.stat().st_size < 20 * 3 * 512**2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert {file.name for file in (out / "packed").iterdir()} == {"lock", "train.npy.tmp", "train.npy.crc32"}
    assert not open_split(out).is_packed
    pack.pack(out)
    killed = contents(out)
    shutil.rmtree(out / "packed")
    pack.pack(out)
    assert contents(out) == killed


def test_a_full_disk_is_told_before_and_while_packing(prepared, tmp_path, monkeypatch):
    root = shutil.copytree(prepared, tmp_path / "p")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(
        pack.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 40 * 20 * 20 * 3 + 15 * 16 * 16 * 3 - 1)
    )
    with pytest.raises(UserError, match=r"p/packed: the packed images need 0.1 MB more, and 0.1 MB are free"):
        pack.pack(root)
    assert not contents(root)
    monkeypatch.undo()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.os, "fsync", full)
    with pytest.raises(UserError, match=r"p/packed: .*No space left on device. Make room and run the command again"):
        pack.pack(root)
    assert contents(root).keys() == {"train.npy.tmp", "train.npy.crc32"}


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
    "column missing": (rewrite_index(lambda table: table.drop("crc32")), r"index.parquet has the columns .*, not path"),
    "column's type": (rewrite_index(lambda table: table.cast({"crc32": pl.Int64})), r"index.parquet has the columns "),
    "other records": (rewrite_index(lambda table: table.head(20)), r"index.parquet is not of the training images"),
    "other order": (rewrite_index(lambda table: table.reverse()), r"index.parquet is not of the training images"),
    "file missing": (lambda folder: (folder / "train.npy").unlink(), r"train.npy cannot be read .*No such file"),
    "no .npy": (rewrite("train.npy", lambda data: b"hello" + data), r"train.npy cannot be read "),
    "header": (rewrite("train.npy", lambda data: data.replace(b")", b"(", 1)), r"train.npy cannot be read "),
    "empty": (rewrite("train.npy", lambda _: b""), r"train.npy cannot be read "),
    "type": (save(np.zeros((40, 20, 20, 3), np.int8)), r"train.npy cannot be read \(int8 "),
    "not images": (save(np.zeros((40, 20, 10, 3), np.uint8)), r"train.npy cannot be read \(uint8 \(40, 20, 10, 3\)"),
    "count": (save(np.zeros((39, 20, 20, 3), np.uint8)), r"train.npy holds 39 images, not 40"),
    "truncated": (rewrite("train.npy", lambda data: data[:-1]), r"train.npy has 48127 bytes, not 48128"),
    "too long": (rewrite("train.npy", lambda data: data + b"x"), r"train.npy has 48129 bytes, not 48128"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_pack_that_does_not_fit_is_refused_and_made_anew(copied, packed, prepared, damage, message, capsys):
    damage(copied / "packed")
    with pytest.raises(UserError, match=message) as error:
        open_split(copied)
    assert f"delete {copied / 'packed'} and run `main.py prepare --pack` again" in str(error.value)
    shutil.copytree(prepared / "cleaned_images", copied / "cleaned_images")
    pack.pack(copied)
    assert contents(copied) == contents(packed)
    assert re.search(f"note: .*{message}.*; it is packed anew", capsys.readouterr().out)


def test_a_pack_is_not_given_up_where_it_cannot_be_read_or_made_anew(copied, prepared):
    train = copied / "packed" / "train.npy"
    rewrite("test.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]))(copied / "packed")
    before = train.read_bytes()
    shutil.copytree(prepared / "cleaned_images", copied / "cleaned_images")
    photograph = next(copied.glob("cleaned_images/*/*"))
    photograph.write_bytes(photograph.read_bytes()[:-9])
    with pytest.raises(UserError, match="is a truncated JPEG"):
        pack.pack(copied)
    assert train.read_bytes() == before
    test = copied / "packed" / "test.npy"
    test.unlink()
    test.mkdir()
    with pytest.raises(UserError, match="test.npy cannot be read .*Is a directory"):
        pack.pack(copied)
    assert train.read_bytes() == before


def test_the_metadata_may_not_change_under_a_pack(copied):
    table = pl.read_parquet(copied / "metadata.parquet")
    table.reverse().write_parquet(copied / "metadata.parquet")
    with pytest.raises(UserError, match="is not of the training images in metadata.parquet"):
        open_split(copied)


def test_images_that_were_made_otherwise_are_refused(copied, prepared):
    other = (copied / "prepared.json").read_text().replace("0.2", "0.1")
    (copied / "prepared.json").write_text(other)
    with pytest.raises(UserError, match="index.parquet is of images that were made otherwise than "):
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
    with pytest.raises(UserError, match=rf"train.npy is damaged: the image of {split.paths[7]} .*delete .*/packed and"):
        take(split, 5, workers=workers)
    shutil.copytree(prepared / "cleaned_images", copied / "cleaned_images")
    pack.pack(copied)
    assert contents(copied) == contents(packed)


def test_each_image_is_checked_once_in_a_process(copied, monkeypatch):
    split, checks = open_split(copied), []
    monkeypatch.setattr(images.zlib, "crc32", lambda image, crc32=images.zlib.crc32: checks.append(0) or crc32(image))
    take(split, 10)  # two epochs
    assert len(checks) == 40


def test_a_file_cut_off_while_it_is_read_is_an_error(copied):
    split = open_split(copied)
    os.truncate(copied / "packed" / "train.npy", 128 + 39 * 1200 + 5)
    with pytest.raises(UserError, match=rf"train.npy ends inside the image of {split.paths[39]}: delete"):
        take(split, 5)
