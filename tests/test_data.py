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

from vit_nabirds.data import batches as data
from vit_nabirds.errors import UserError


@pytest.fixture
def train_split(prepared):
    return data.open_split(prepared, data.read_table(prepared), train=True)


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copied")
    return tmp_path / "copied"


def take(split, steps, hosts=1, start=0, workers=0, seed=0, batch_size=8):
    """The global batches of `steps` steps: the blocks of all hosts end to end."""
    blocks = []
    for host in range(hosts):
        batches = data.train_batches(
            split, batch_size, seed, start, workers, grain.sharding.ShardOptions(host, hosts, drop_remainder=True)
        )
        blocks.append([next(batches) for _ in range(steps)])
        batches.close()
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


def test_each_epoch_is_a_fresh_permutation_of_all_records(train_split):
    rows = np.concatenate([batch["row"] for batch in take(train_split, 15)]).reshape(3, 40)
    for epoch in rows:
        assert sorted(epoch) == sorted(train_split.rows)
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    other_seed = np.concatenate([batch["row"] for batch in take(train_split, 5, seed=1)])
    assert not np.array_equal(rows[0], other_seed)


def test_a_batch_may_be_larger_than_the_split(train_split):
    rows = np.concatenate([batch["row"] for batch in take(train_split, 3, batch_size=100)])
    assert np.array_equal(rows[:120].reshape(3, 40)[0], take(train_split, 1, batch_size=40)[0]["row"])
    assert all(sorted(epoch) == sorted(train_split.rows) for epoch in rows[:280].reshape(7, 40))


def test_the_order_of_records_is_the_same_with_any_numpy():
    orders = [data._order(3, epoch, 10).tolist() for epoch in (0, 1)]
    assert orders == [[9, 1, 0, 8, 2, 4, 3, 5, 7, 6], [5, 1, 3, 0, 6, 9, 8, 7, 2, 4]]


def test_image_label_and_row_belong_together(train_split, prepared):
    table = data.read_table(prepared)
    batch = take(train_split, 1)[0]
    for image, label, row in zip(batch["image"], batch["label"], batch["row"], strict=True):
        assert table["species_id"][int(row)] == label
        file = prepared / "cleaned_images" / table["path"][int(row)]
        assert np.array_equal(image, simplejpeg.decode_jpeg(file.read_bytes()))


@pytest.mark.parametrize("hosts, batch_size", [(1, 8), (2, 8), (4, 16), (1, 15)])
def test_evaluation_sees_every_test_image_once(prepared, hosts, batch_size):
    split = data.open_split(prepared, data.read_table(prepared), train=False)
    rows, shapes = [], set()
    for host in range(hosts):
        shard = grain.sharding.ShardOptions(host, hosts, drop_remainder=True)
        for batch in data.test_batches(split, batch_size, 0, shard):
            rows += batch["row"][batch["mask"] == 1].tolist()
            shapes.add(batch["image"].shape)
            assert batch["mask"].dtype == np.float32
            assert (batch["row"][batch["mask"] == 0] == split.rows[0]).all()
    assert sorted(rows) == sorted(split.rows) and len(rows) == 15
    assert shapes == {(batch_size // hosts, 16, 16, 3)}  # one shape: nothing is compiled twice


def test_worker_processes_survive_signals_and_start_no_jax_backend(train_split):
    blocks = grain.MapDataset.range(1).map(_look_around)
    with contextlib.closing(data._iterate(blocks, workers=1)) as iterator:
        assert next(iterator) == {"jax_backends": 0, "blocked": 2}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # and the main process hears them


def _look_around(_):
    from jax._src import xla_bridge

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}
    return {"jax_backends": len(xla_bridge._backends), "blocked": len(blocked)}


def test_worker_count_follows_the_share_of_cpus(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert data.worker_count(-1) == 7 and data.worker_count(-1, is_packed=True) == 0
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert data.worker_count(-1) == 0
    assert data.worker_count(3) == data.worker_count(3, is_packed=True) == 3


def test_course_folder_gets_contiguous_labels(copied):
    """The course's species_id is UInt64, from 1, and has a species too many where a name has two spaces."""
    file = copied / "metadata.parquet"
    table = pl.read_parquet(file)
    names = table["species_name"].to_list()
    names[0] = names[0].replace(" ", "  ", 1)
    table = table.with_columns(species_name=pl.Series(names), is_training_img=pl.col("is_training_img").cast(pl.Int64))
    table = table.with_columns(species_id=pl.col("species_name").rank("dense").cast(pl.UInt64))
    assert table["species_id"].n_unique() == 5 and table["species_id"].min() == 1
    table.write_parquet(file)
    remade = data.read_table(copied)
    assert sorted(remade["species_id"].unique()) == [0, 1, 2, 3]
    assert len(data.species_names(remade)) == 4
    assert len(data.open_split(copied, remade, train=True)) == 40


def test_fingerprint_is_of_the_records_not_of_the_place(copied, prepared):
    table = data.read_table(prepared)
    assert data.fingerprint(copied, data.read_table(copied)) == data.fingerprint(prepared, table)
    moved = table.with_columns(is_training_img=~pl.col("is_training_img"))
    assert data.fingerprint(prepared, moved) != data.fingerprint(prepared, table)


def test_out_of_range_label_is_an_error(train_split):
    with pytest.raises(UserError, match=r"row \d+ \(.*\) has label 3, but the model has 3 classes"):
        data.check_labels(train_split, 3)


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
def test_an_image_that_changes_its_size_later_is_an_error(copied, change, shape):
    split = data.open_split(copied, data.read_table(copied), train=True)
    change(copied / "cleaned_images" / split.paths[0])
    with pytest.raises(UserError, match=rf"{split.paths[0]} is \({shape}, 3\), unlike the other images"):
        take(split, 5)


def test_images_that_are_not_jpeg_are_read_too(copied):
    table = data.read_table(copied)
    file = copied / "cleaned_images" / table.filter("is_training_img")["path"][0]
    pixels = simplejpeg.decode_jpeg(file.read_bytes())
    Image.fromarray(pixels).save(file, "PNG")
    split = data.open_split(copied, table, train=True)
    assert np.array_equal(split[0]["image"], pixels)
    Image.fromarray(pixels[..., 0]).save(file, "PNG")
    with pytest.raises(UserError, match=r"is \(20, 3\), unlike the other images"):
        split[0]


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
    table = data.read_table(copied)
    path = table.filter("is_training_img")["path"][5]
    damage(copied / "cleaned_images" / path)
    with pytest.raises(UserError, match=message) as error:
        data.open_split(copied, table, train=True)
    assert path in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_damaged_inside_is_an_error_that_names_it(copied, workers):
    table = data.read_table(copied)
    path = table.filter("is_training_img")["path"][0]
    file = copied / "cleaned_images" / path
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = content[len(content) // 2 : -40] + b"\xff\xd9"  # its end is there, its middle not
    file.write_bytes(content)
    split = data.open_split(copied, table, train=True)
    with pytest.raises(UserError, match="cannot be read") as error:
        take(split, 5, workers=workers)
    assert path in str(error.value)


def test_metadata_errors_name_the_file_and_the_row(copied, tmp_path):
    file = copied / "metadata.parquet"
    with pytest.raises(UserError, match="main.py prepare"):
        data.read_table(tmp_path)
    table = pl.read_parquet(file)
    table.drop("species_name").write_parquet(file)
    with pytest.raises(UserError, match="no column 'species_name'"):
        data.read_table(copied)
    nameless = pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise(pl.col("species_name"))
    table.with_columns(species_name=nameless).write_parquet(file)
    with pytest.raises(UserError, match=r"row 7 .*an empty species_name"):
        data.read_table(copied)
    pl.concat([table, table.tail(1)]).write_parquet(file)
    with pytest.raises(UserError, match=r"row \d+ .*a path that another row has too"):
        data.read_table(copied)
    table.with_columns(is_training_img=pl.lit(2)).write_parquet(file)
    with pytest.raises(UserError, match=r"row 0 .*is_training_img other than 0 and 1"):
        data.read_table(copied)
    table.with_columns(is_training_img=pl.lit("yes")).write_parquet(file)
    with pytest.raises(UserError, match="a column of the wrong type"):
        data.read_table(copied)
    file.write_text("not parquet")
    with pytest.raises(UserError, match="not a readable Parquet"):
        data.read_table(copied)
