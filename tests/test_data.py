"""Batches: a pure function of (seed, step), the same for any number of hosts and workers; clear errors."""

import contextlib
import shutil
import signal

import grain
import numpy as np
import polars as pl
import pytest
import simplejpeg
from PIL import Image

from vit_nabirds.data import batches
from vit_nabirds.data.photographs import check_labels, open_split
from vit_nabirds.data.table import fingerprint, read_table, species_names
from vit_nabirds.errors import ConfigError, UserError


@pytest.fixture
def train_split(prepared):
    return open_split(prepared, read_table(prepared), train=True)


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copied")
    return tmp_path / "copied"


def shard_of(host, hosts):
    return grain.sharding.ShardOptions(host, hosts, drop_remainder=True)


def take(split, steps, hosts=1, start=0, workers=0, seed=0, batch_size=8):
    """The global batches of `steps` steps: the blocks of all hosts end to end."""
    blocks = []
    for host in range(hosts):
        iterator = batches.train_batches(split, batch_size, seed, start, workers, shard_of(host, hosts))
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
    orders = [batches._epoch_order(3, epoch, 10).tolist() for epoch in (0, 1)]
    assert orders == [[9, 1, 0, 8, 2, 4, 3, 5, 7, 6], [5, 1, 3, 0, 6, 9, 8, 7, 2, 4]]


def test_image_label_and_row_belong_together(train_split, prepared):
    table = read_table(prepared)
    batch = take(train_split, 1)[0]
    for image, label, row in zip(batch["image"], batch["label"], batch["row"], strict=True):
        assert table["species_id"][int(row)] == label
        file = prepared / "cleaned_images" / table["path"][int(row)]
        assert np.array_equal(image, simplejpeg.decode_jpeg(file.read_bytes()))


@pytest.mark.parametrize("hosts, batch_size", [(1, 8), (2, 8), (4, 16), (1, 15)])
def test_evaluation_sees_every_test_image_once(prepared, hosts, batch_size):
    split = open_split(prepared, read_table(prepared), train=False)
    rows, shapes = [], set()
    for host in range(hosts):
        for batch in batches.test_batches(split, batch_size, 0, shard_of(host, hosts)):
            rows += batch["row"][batch["mask"] == 1].tolist()
            shapes.add(batch["image"].shape)
            assert batch["mask"].dtype == np.float32
            assert (batch["row"][batch["mask"] == 0] == split.rows[0]).all()
    assert sorted(rows) == sorted(split.rows) and len(rows) == 15
    assert shapes == {(batch_size // hosts, 16, 16, 3)}  # one shape: nothing is compiled twice


def test_worker_processes_ignore_signals_and_start_no_jax_backend(train_split):
    blocks = grain.MapDataset.range(1).map(_look_around)
    with contextlib.closing(batches._iterate(blocks, workers=1)) as iterator:
        assert next(iterator) == {"jax_backends": 0, "blocked": 2}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the main process receives them


def _look_around(_):
    from jax._src import xla_bridge

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}
    return {"jax_backends": len(xla_bridge._backends), "blocked": len(blocked)}


def test_worker_count_follows_the_share_of_cpus(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert batches.worker_count(-1) == 7 and batches.worker_count(-1, is_packed=True) == 0
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert batches.worker_count(-1) == 0
    assert batches.worker_count(3) == batches.worker_count(3, is_packed=True) == 3


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
    assert sorted(remade["species_id"].unique()) == [0, 1, 2, 3]
    assert len(species_names(remade)) == 4
    assert len(open_split(copied, remade, train=True)) == 40


def test_fingerprint_depends_on_the_table_not_on_the_folder(copied, prepared):
    table = read_table(prepared)
    assert fingerprint(copied, read_table(copied)) == fingerprint(prepared, table)
    moved = table.with_columns(is_training_img=~pl.col("is_training_img"))
    assert fingerprint(prepared, moved) != fingerprint(prepared, table)


def test_out_of_range_label_is_an_error(train_split):
    with pytest.raises(UserError, match=r"row \d+ \(.*\) has label 3, but the model has 3 classes"):
        check_labels(train_split, 3)


def damage_missing(file):
    file.unlink()


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:-200])


def damage_not_an_image(file):
    file.write_bytes(b"hello")


def grow(file):
    Image.new("RGB", (30, 20)).save(file, "JPEG")


def shrink(file):
    Image.new("RGB", (10, 20)).save(file, "JPEG")


def grow_a_png(file):
    Image.new("RGB", (30, 20)).save(file, "PNG")


@pytest.mark.parametrize("change, shape", [(grow, "20, 30"), (shrink, "20, 10"), (grow_a_png, "20, 30")])
def test_an_image_whose_size_changes_later_is_an_error(copied, change, shape):
    split = open_split(copied, read_table(copied), train=True)
    change(copied / "cleaned_images" / split.images.paths[0])
    with pytest.raises(UserError, match=rf"{split.images.paths[0]} is \({shape}\) px, unlike the other images"):
        take(split, 5)


def test_other_formats_than_jpeg_are_read_too(copied):
    table = read_table(copied)
    file = copied / "cleaned_images" / table.filter("is_training_img")["path"][0]
    pixels = simplejpeg.decode_jpeg(file.read_bytes())
    Image.fromarray(pixels).save(file, "PNG")
    split = open_split(copied, table, train=True)
    assert np.array_equal(split.read([0])["image"][0], pixels)
    Image.fromarray(pixels[..., 0]).save(file, "PNG")
    assert (split.read([0])["image"][0] == pixels[..., :1]).all()
    Image.fromarray(pixels[..., 0].astype(np.uint16)).save(file, "PNG")
    with pytest.raises(UserError, match="more than 8 bits a pixel"):
        split.read([0])


def damage_other_size(file):
    Image.new("RGB", (30, 30)).save(file, "JPEG")


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_missing, "is missing"),
        (damage_truncated, "truncated"),
        (damage_not_an_image, "cannot be read"),
        (damage_other_size, r"\(30, 30\) px"),
    ],
)
def test_damaged_image_is_found_before_training(copied, damage, message):
    table = read_table(copied)
    path = table.filter("is_training_img")["path"][5]
    damage(copied / "cleaned_images" / path)
    with pytest.raises(UserError, match=message) as error:
        open_split(copied, table, train=True)
    assert path in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_damaged_inside_is_an_error_that_names_it(copied, workers):
    table = read_table(copied)
    path = table.filter("is_training_img")["path"][0]
    file = copied / "cleaned_images" / path
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = content[len(content) // 2 : -40] + b"\xff\xd9"  # its end is there, its middle not
    file.write_bytes(content)
    split = open_split(copied, table, train=True)
    with pytest.raises(UserError, match="cannot be read") as error:
        take(split, 5, workers=workers)
    assert path in str(error.value)


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
