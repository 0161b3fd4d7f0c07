"""Batches: a pure function of (seed, step), the same for any number of hosts and workers; clear errors."""

import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import grain
import numpy as np
import polars as pl
import pytest
import simplejpeg
from PIL import Image
from tiny_config import VALIDATION

from vit_nabirds.data import batches
from vit_nabirds.data.photographs import check_labels, open_split
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.sampling import epoch_order
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.data.table import class_names, fingerprint, read_table
from vit_nabirds.data.unread import Unread
from vit_nabirds.errors import ConfigError, TransientError, UserError
from vit_nabirds.parallel.preemption import SIGNALS


@pytest.fixture
def train_split(prepared):
    return open_split(prepared, read_table(prepared, validation=VALIDATION), "train")


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copied")
    return tmp_path / "copied"


def shard_of(host, hosts):
    return grain.sharding.ShardOptions(host, hosts, drop_remainder=True)


def take(split, steps, hosts=1, start=0, workers=0, seed=0, batch_size=8, skip=False):
    """The global batches of `steps` steps: the blocks of all hosts end to end."""
    blocks = []
    for host in range(hosts):
        iterator = batches.train_batches(split, batch_size, seed, start, workers, shard_of(host, hosts), skip)
        blocks.append([next(iterator) for _ in range(steps)])
        iterator.close()
    return [
        {name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*blocks, strict=True)
    ]


def same(left, right):
    return all(np.array_equal(a[name], b[name]) for a, b in zip(left, right, strict=True) for name in a)


def test_batches_do_not_depend_on_hosts_workers_or_start(train_split):
    reference = take(train_split, 12)
    assert reference[0]["image"].shape == (8, 20, 20, 3) and reference[0]["image"].dtype == np.uint8
    assert same(take(train_split, 12, hosts=2), reference)
    assert same(take(train_split, 12, hosts=4), reference)
    assert same(take(train_split, 5, start=7), reference[7:])
    assert same(take(train_split, 5, hosts=2, start=7, workers=2), reference[7:])


def test_a_block_is_that_of_the_iterator(train_split):
    block = batches.train_block(train_split, 8, 0, 7, shard_of(1, 2))
    expected = {name: values[4:] for name, values in take(train_split, 1, start=7)[0].items()}
    assert same([block], [expected])


def test_each_epoch_is_a_new_permutation_of_all_photographs(train_split):
    rows = np.concatenate([batch["row"] for batch in take(train_split, 15)]).reshape(3, 40)
    for epoch in rows:
        assert sorted(epoch) == sorted(train_split.rows)
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    other_seed = np.concatenate([batch["row"] for batch in take(train_split, 5, seed=1)])
    assert not np.array_equal(rows[0], other_seed)


def test_batches_may_be_larger_than_the_split(train_split):
    rows = np.concatenate([batch["row"] for batch in take(train_split, 3, batch_size=100)])
    assert np.array_equal(rows[:120].reshape(3, 40)[0], take(train_split, 1, batch_size=40)[0]["row"])
    assert all(sorted(epoch) == sorted(train_split.rows) for epoch in rows[:280].reshape(7, 40))


def test_the_order_is_the_same_with_any_numpy():
    orders = [epoch_order(3, epoch, np.zeros(10)).tolist() for epoch in (0, 1)]
    assert orders == [[9, 1, 0, 8, 2, 4, 3, 5, 7, 6], [5, 1, 3, 0, 6, 9, 8, 7, 2, 4]]


def test_image_label_and_row_belong_together(train_split, prepared):
    table = read_table(prepared)
    batch = take(train_split, 1)[0]
    for image, label, row in zip(batch["image"], batch["label"], batch["row"], strict=True):
        assert table["label"][int(row)] == label
        file = prepared / "cleaned_images" / table["path"][int(row)]
        assert np.array_equal(image, simplejpeg.decode_jpeg(file.read_bytes()))


@pytest.mark.parametrize("hosts, batch_size", [(1, 8), (2, 8), (4, 16), (1, 15)])
def test_evaluation_sees_every_test_image_once(prepared, hosts, batch_size):
    split = open_split(prepared, read_table(prepared), "test")
    rows, shapes = [], set()
    for host in range(hosts):
        for batch in batches.eval_batches(split, batch_size, 0, shard_of(host, hosts)):
            rows += batch["row"][batch["mask"] == 1].tolist()
            shapes.add(batch["image"].shape)
            assert batch["mask"].dtype == np.float32
            assert (batch["row"][batch["mask"] == 0] == -1).all()
    assert sorted(rows) == sorted(split.rows) and len(rows) == 15
    assert shapes == {(batch_size // hosts, 16, 16, 3)}  # one shape: nothing is compiled twice


def test_worker_processes_ignore_signals_and_start_no_jax_backend(train_split):
    iterator = batches._iterate(_look_around, range(1), workers=1, is_packed=False, waits_for=batches.unwatched)
    with contextlib.closing(iterator):
        assert next(iterator) == {"jax_backends": 0, "blocked": 4}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the main process receives them


def _look_around(_):
    from jax._src import xla_bridge

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)
    return {"jax_backends": len(xla_bridge._backends), "blocked": len(blocked)}


def test_worker_count_follows_the_share_of_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("vit_nabirds.parallel.cpus._quotas", lambda _: [])
    assert batches.worker_count(-1) == 7 and batches.worker_count(-1, is_packed=True) == 0
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert batches.worker_count(-1) == 0
    assert batches.worker_count(3) == batches.worker_count(3, is_packed=True) == 3


def test_batches_of_workers_fit_into_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("vit_nabirds.parallel.cpus._quotas", lambda _: [])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**26, total=2**26))  # as in Docker
    batch = 128 * 269 * 269 * 3
    assert batches.worker_count(-1, batch_bytes=batch, shared=tmp_path) == 0
    assert batches.worker_count(-1, batch_bytes=batch // 8, shared=tmp_path) == 4
    assert batches.worker_count(4, batch_bytes=batch // 8, shared=tmp_path) == 4
    assert batches.worker_count(4, batch_bytes=batch, shared=tmp_path / "none") == 4
    message = r"workers is 5, .* need 66 MiB of .*, but 64 MiB are free there: use at most 4 \(0: threads\)"
    with pytest.raises(ConfigError, match=message):
        batches.worker_count(5, batch_bytes=batch // 8, shared=tmp_path)


def test_more_workers_than_the_cpus_can_feed_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    for workers in (-1, 0, 8):
        batches.check_workers(workers)
    message = r"config.data.workers is {}: it must be -1 \(automatic\), 0 \(threads\) or at most 8 processes"
    for workers in (-2, 9):
        with pytest.raises(ConfigError, match=message.format(workers)):
            batches.check_workers(workers)
    with pytest.raises(ConfigError, match=message.format(100000)):
        batches.worker_count(100_000)


def test_course_folder_gets_contiguous_labels(copied):
    """The course's species_id is UInt64 and starts at 1; a name with two spaces counts as another species."""
    file = copied / "metadata.parquet"
    table = pl.read_parquet(file)
    names = table["species_name"].to_list()
    names[0] = names[0].replace(" ", "  ", 1)
    table = table.with_columns(species_name=pl.Series(names), is_training_img=pl.col("is_training_img").cast(pl.Int64))
    table = table.with_columns(species_id=pl.col("species_name").rank("dense").cast(pl.UInt64))
    assert table["species_id"].n_unique() == 5 and table["species_id"].min() == 1
    table.write_parquet(file)
    remade = read_table(copied)
    assert sorted(remade["label"].unique()) == [0, 1, 2, 3]
    assert len(class_names(remade)) == 4
    assert len(open_split(copied, remade, "train")) == 48


def test_the_courses_folder_without_settings_or_checksums(copied):
    """Sizes come from the first image of a split; a photograph that is held out is the middle of its image."""
    (copied / "prepared.json").unlink()
    file = copied / "metadata.parquet"
    pl.read_parquet(file).select("path", "species_name", "photographer", "is_training_img").write_parquet(file)
    table = read_table(copied, validation=VALIDATION)
    train, held, test = (open_split(copied, table, split) for split in ("train", "validation", "test"))
    assert (train.size, held.size, test.size) == (20, 16, 16) and (len(train), len(held)) == (40, 8)
    image = simplejpeg.decode_jpeg((copied / "cleaned_images" / held.path(0)).read_bytes())
    assert np.array_equal(image_of(held, 0), image[2:18, 2:18])
    with pytest.raises(ConfigError, match="config.data.label is 'category', but .* has no column 'subcategory'"):
        read_table(copied, "category")


def test_categories_are_labels_too(prepared):
    species, categories = (class_names(read_table(prepared, label)) for label in ("species", "category"))
    assert len(species) == 4 and len(categories) == 6  # two of them are drawn in two plumages
    assert {name.partition(" (")[0] for name in categories} == set(species)
    assert categories == sorted(categories)


def image_of(split, index):
    split.read(index, image := np.empty((split.size, split.size, 3), np.uint8))
    return image


def test_a_photograph_that_is_held_out_looks_like_a_test_image(tmp_path):
    """The bird alone, as large as the square, though a training image shows a margin around it."""
    draw_archive(tmp_path / "a", species=2, train=10, test=1, size=(90, 160))
    sizes = {"train_size": 134, "test_size": 112}
    prepare(tmp_path / "a", tmp_path / "p", **sizes)
    table = read_table(tmp_path / "p", validation=0.2)
    held = open_split(tmp_path / "p", table, "validation")
    assert len(held) == 4 and not set(held.rows) & set(open_split(tmp_path / "p", table, "train").rows)

    # The same archive, in which they are test photographs.
    ids = dict(line.split()[::-1] for line in (tmp_path / "a" / "images.txt").read_text().splitlines())
    file = tmp_path / "a" / "train_test_split.txt"
    tested = [ids[held.path(index)] for index in range(len(held))]
    rows = [f"{key} {0 if key in tested else value}\n" for key, value in map(str.split, file.read_text().splitlines())]
    file.write_text("".join(rows))
    prepare(tmp_path / "a", tmp_path / "q", **sizes)
    test = open_split(tmp_path / "q", read_table(tmp_path / "q"), "test")
    places = {test.path(index): index for index in range(len(test))}
    for index in range(len(held)):
        expected = image_of(test, places[held.path(index)]).astype(int)
        assert np.abs(expected - image_of(held, index)).mean() < 6
    left, top, width, height = held.birds[0]
    assert max(width, height) < 120  # of 134: there is a margin


def test_fingerprint_depends_on_the_table_not_on_the_folder(copied, prepared):
    table = read_table(prepared)
    assert fingerprint(copied, read_table(copied)) == fingerprint(prepared, table)
    moved = table.with_columns(split=pl.lit("train"))
    others = [moved, read_table(prepared, validation=VALIDATION), read_table(prepared, "category")]
    assert len({fingerprint(prepared, other) for other in [table, *others]}) == 4


def test_out_of_range_label_is_an_error(train_split):
    with pytest.raises(UserError, match=r"row \d+ \(.*\) has label 3, but the model has 3 classes"):
        check_labels(train_split, 3)


def damage_missing(file):
    file.unlink()


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:-200])


def damage_not_an_image(file):
    file.write_bytes(b"hello")


def damage_other_size(file):
    Image.new("RGB", (30, 20)).save(file, "JPEG")


def damage_inside(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_pipe(file):
    file.unlink()
    os.mkfifo(file)


def damage_endless(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def damage_huge(file):
    os.truncate(file, 2**40)


DAMAGES = {
    damage_missing: "No such file",
    damage_pipe: "no regular file",
    damage_endless: "no regular file",
    damage_huge: "1,099,511,627,776 bytes, too many",
    damage_truncated: "not what `prepare` wrote",
    damage_not_an_image: "not what `prepare` wrote",
    damage_other_size: "not what `prepare` wrote",
    damage_inside: "not what `prepare` wrote",
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_has_changed_is_an_error_that_names_it(copied, damage, workers):
    split = open_split(copied, read_table(copied), "train")
    damage(copied / "cleaned_images" / split.path(5))
    with pytest.raises(UserError, match=rf"{split.path(5)} cannot be read .*{DAMAGES[damage]}"):
        take(split, 6, workers=workers)


@pytest.mark.parametrize("skip", [False, True])
def test_storage_that_fails_says_nothing_about_the_photograph(copied, monkeypatch, skip):
    split = open_split(copied, read_table(copied), "train")

    def stale(_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(TransientError, match="Stale file handle.*: run the same command again when the storage"):
        take(split, 6, skip=skip)


def test_without_checksums_size_and_contents_are_still_checked(copied):
    file = copied / "metadata.parquet"
    pl.read_parquet(file).drop("crc32").write_parquet(file)
    split = open_split(copied, read_table(copied), "train")
    image, file = image_of(split, 0), copied / "cleaned_images" / split.path(0)
    Image.fromarray(image).save(file, "PNG")  # whatever the name says
    assert np.array_equal(image_of(split, 0), image)
    for damage, message in (
        (damage_other_size, r"is \(20, 30\) px, unlike the other images of its split \(20 x 20\)"),
        (damage_truncated, "cannot be read"),
        (damage_not_an_image, "cannot be read"),
    ):
        damage(file)
        with pytest.raises(UserError, match=message):
            image_of(split, 0)


@pytest.mark.parametrize("hosts, workers", [(1, 0), (2, 0), (2, 1)])
def test_skipping_takes_the_next_photograph_and_says_which_is_left_out(copied, hosts, workers):
    split = open_split(copied, read_table(copied), "train")
    whole = take(split, 12)
    bad = [split.rows[3], split.rows[30]]
    damage_missing(copied / "cleaned_images" / split.path(3))
    damage_truncated(copied / "cleaned_images" / split.path(30))
    without = take(split, 12, hosts, workers=workers, skip=True)
    assert same(without, take(split, 12, skip=True))  # on any number of hosts
    for before, after in zip(whole, without, strict=True):
        left_out = np.isin(before["row"], bad)
        assert np.array_equal(after["unread"], np.where(left_out, before["row"], -1))
        assert np.array_equal(after["row"][~left_out], before["row"][~left_out])
        assert not np.isin(after["row"], bad).any() and (after["row"] >= 0).all()
    used = np.concatenate([batch["row"] for batch in without[:6]])
    assert set(used) | set(bad) == set(split.rows)  # used or reported


def test_an_evaluation_leaves_out_what_cannot_be_read(copied):
    split = open_split(copied, read_table(copied), "test")
    damage_missing(copied / "cleaned_images" / split.path(2))
    shard = shard_of(0, 1)
    with pytest.raises(UserError, match=rf"{split.path(2)} cannot be read"):
        list(batches.eval_batches(split, 8, 0, shard))
    first, second = batches.eval_batches(split, 8, 0, shard, skip=True)
    assert first["mask"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1] and second["mask"].tolist() == [1] * 7 + [0]
    assert first["unread"].tolist() == [-1, -1, split.rows[2], *[-1] * 5] and not first["image"][2].any()


def test_too_many_unread_photographs_end_the_run(copied, caplog):
    split = open_split(copied, read_table(copied), "train")
    for index in (3, 30):
        damage_missing(copied / "cleaned_images" / split.path(index))
    steps = batches.train_batches(split, 8, 0, 0, 0, shard_of(0, 1), skip=True)
    watched = Unread(split, most=1 / 48).watch(steps)
    assert "unread" not in next(watched)
    with pytest.raises(UserError, match=r"2 of 48 photographs cannot be read, more than config.data.max_skipped"):
        [next(watched) for _ in range(6)]
    assert sum("Left out (1 of 48 photographs so far)." in message for message in caplog.messages) == 1


def test_storage_that_fails_is_an_error_even_when_skipping(copied):
    split = open_split(copied, read_table(copied), "train")
    shutil.rmtree(copied / "cleaned_images")
    with pytest.raises(UserError, match="No such file"):
        take(split, 1, skip=True)


def test_metadata_errors_name_the_file_and_the_row(copied, tmp_path):
    file = copied / "metadata.parquet"
    with pytest.raises(UserError, match="main.py prepare"):
        read_table(tmp_path)
    table = pl.read_parquet(file)
    table.drop("species_name").write_parquet(file)
    with pytest.raises(UserError, match="no column 'species_name'"):
        read_table(copied)
    nameless = pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise(pl.col("species_name"))
    table.with_columns(species_name=nameless).write_parquet(file)
    with pytest.raises(UserError, match=r"row 7 .*an empty species_name"):
        read_table(copied)
    pl.concat([table, table.tail(1)]).write_parquet(file)
    with pytest.raises(UserError, match=r"row \d+ .*a path that another row has too"):
        read_table(copied)
    table.with_columns(is_training_img=pl.lit(2)).write_parquet(file)
    with pytest.raises(UserError, match=r"row 0 .*is_training_img other than 0 and 1"):
        read_table(copied)
    table.with_columns(is_training_img=pl.lit("yes")).write_parquet(file)
    with pytest.raises(UserError, match="a column of the wrong type"):
        read_table(copied)
    file.write_text("not parquet")
    with pytest.raises(UserError, match="not a readable Parquet"):
        read_table(copied)
