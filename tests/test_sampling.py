"""How often classes are drawn, what comes before what is drawn again, and repeated photographs in a batch."""

import shutil

import numpy as np
import pytest
from test_data import same, shard_of
from tiny_config import VALIDATION

from vit_nabirds.data.batches import check_repeats, train_batches, train_block
from vit_nabirds.data.photographs import Photographs, open_split
from vit_nabirds.data.sampling import draws_before, epoch_order
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import ConfigError

COUNTS = {0: 36, 1: 9, 2: 4, 5: 1}  # photographs of each class; 3 and 4 have none
LABELS = np.random.default_rng(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values()))).astype(np.int32)


def orders(sampling, epochs, seed=0, labels=LABELS):
    return [epoch_order(seed, epoch, labels, sampling) for epoch in range(epochs)]


@pytest.fixture
def train_split(prepared):
    return open_split(prepared, read_table(prepared, validation=VALIDATION), "train")


@pytest.fixture
def uneven_split(prepared):
    return uneven(prepared)


def uneven(root):
    """25 photographs, of the four classes 10, 10, 3 and 2."""
    whole = open_split(root, read_table(root, validation=VALIDATION), "train")
    kept = np.concatenate([np.flatnonzero(whole.labels == label)[:most] for label, most in enumerate((10, 10, 3, 2))])
    kept.sort()
    parts = {name: getattr(whole, name)[kept] for name in ("indices", "labels", "rows")}
    return Photographs(whole.images, **parts, size=whole.size)


def take(split, steps, hosts=1, start=0, workers=0, batch_size=12, **options):
    """The global batches: the blocks of all hosts end to end."""
    blocks = []
    for host in range(hosts):
        iterator = train_batches(split, batch_size, 0, start, workers, shard_of(host, hosts), **options)
        blocks.append([next(iterator) for _ in range(steps)])
        iterator.close()
    return [
        {name: np.concatenate([b[name] for b in parts]) for name in parts[0]} for parts in zip(*blocks, strict=True)
    ]


def test_uniform_epochs_are_the_permutations_they_always_were():
    for epoch, order in enumerate(orders("uniform", 3, seed=7)):
        assert np.array_equal(order, np.random.RandomState([7, epoch]).permutation(50))


@pytest.mark.parametrize("sampling, shares", [("balanced", [1, 1, 1, 1]), ("sqrt", [6, 3, 2, 1])])
def test_each_class_is_drawn_by_its_share_over_any_number_of_epochs(sampling, shares):
    drawn = np.zeros(4)
    for epoch, order in enumerate(orders(sampling, 30), 1):
        assert len(order) == 50
        drawn += [(LABELS[order] == label).sum() for label in COUNTS]
        assert np.abs(drawn - epoch * 50 * np.array(shares) / sum(shares)).max() < 1


@pytest.mark.parametrize("sampling", ["balanced", "sqrt"])
def test_all_photographs_of_a_class_are_drawn_before_one_comes_again(sampling):
    sequence = np.concatenate(orders(sampling, 20))
    for label, count in COUNTS.items():
        drawn = sequence[LABELS[sequence] == label]
        rounds = drawn[: len(drawn) // count * count].reshape(-1, count)
        assert len(rounds) >= 6 and (np.sort(rounds) == np.flatnonzero(LABELS == label)).all()
        assert count < 3 or not np.array_equal(rounds[0], rounds[1])


@pytest.mark.parametrize("sampling", ["balanced", "sqrt"])
def test_classes_come_in_no_order_and_differently_with_each_epoch_and_seed(sampling):
    first, second = orders(sampling, 2)
    other = orders(sampling, 1, seed=1)[0]
    assert not np.array_equal(LABELS[first], LABELS[second]) and not np.array_equal(LABELS[first], LABELS[other])
    drawn = LABELS[np.concatenate(orders(sampling, 200))].reshape(200, 2, 25)
    early, late = ((drawn[:, half] == 0).mean() for half in (0, 1))
    assert early == pytest.approx(late, rel=0.1)


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1, 1, 1, 1, 1), (1, 1, 2), (3, 1000, 1, 7), tuple(range(1, 60))])
@pytest.mark.parametrize("sampling", ["balanced", "sqrt"])
def test_epochs_are_full_whatever_the_classes(counts, sampling):
    before = np.array([draws_before(epoch, counts, sampling) for epoch in range(200)])
    assert (np.diff(before, axis=0) >= 0).all() and (np.diff(before.sum(1)) == sum(counts)).all()


def test_where_classes_are_equal_each_photograph_is_drawn_once():
    labels = np.tile(np.arange(5, dtype=np.int32), 8)
    for sampling in ("balanced", "sqrt"):
        assert (np.sort(orders(sampling, 4, labels=labels)) == np.arange(40)).all()


def test_the_sampled_order_is_the_same_with_any_numpy():
    labels = np.int32([0, 0, 0, 0, 1])
    assert [order.tolist() for order in orders("balanced", 3, 3, labels)] == BALANCED
    assert [order.tolist() for order in orders("sqrt", 3, 3, labels)] == SQRT


BALANCED = [[3, 4, 4, 0, 4], [1, 2, 4, 1, 4], [4, 2, 0, 4, 4]]
SQRT = [[3, 4, 0, 1, 4], [2, 1, 4, 2, 4], [0, 3, 1, 4, 3]]


def test_batches_follow_the_sampled_order(uneven_split):
    rows = np.concatenate([batch["row"] for batch in take(uneven_split, 25, sampling="balanced")])
    expected = np.concatenate(orders("balanced", 12, labels=uneven_split.labels))
    assert np.array_equal(rows, uneven_split.rows[expected])
    labels = np.concatenate([batch["label"] for batch in take(uneven_split, 25, sampling="balanced")])
    assert np.bincount(labels).tolist() == [75, 75, 75, 75]


@pytest.mark.parametrize("options", [dict(sampling="sqrt"), dict(repeats=3), dict(sampling="balanced", repeats=4)])
def test_batches_do_not_depend_on_hosts_workers_or_start(uneven_split, options):
    reference = take(uneven_split, 10, **options)
    for hosts in (2, 4, 6):
        assert same(take(uneven_split, 4, hosts=hosts, start=6, **options), reference[6:])
    assert same(take(uneven_split, 3, hosts=2, start=7, workers=1, **options), reference[7:])
    block = train_block(uneven_split, 12, 0, 7, shard_of(1, 2), **options)
    assert same([block], [{name: values[6:] for name, values in reference[7].items()}])


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_a_batch_repeats_its_photographs_one_after_another(uneven_split, sampling):
    """Twelve images of four photographs, those that three times smaller batches would have."""
    plain = take(uneven_split, 15, batch_size=4, sampling=sampling)
    for batch, few in zip(take(uneven_split, 15, repeats=3, sampling=sampling), plain, strict=True):
        assert batch["image"].shape == (12, 20, 20, 3)
        for name in batch:
            assert np.array_equal(batch[name], np.concatenate([few[name]] * 3))


def test_neighbours_in_a_batch_are_different_photographs(train_split):
    for repeats in (2, 3, 4):
        for batch in take(train_split, 3, repeats=repeats):  # within the first epoch
            assert (np.diff(batch["row"]) != 0).all() and (
                np.unique(batch["row"], return_counts=True)[1] == repeats
            ).all()


def test_repeats_read_a_photograph_once_on_each_host(train_split):
    read = []

    class Counted(Photographs):
        def read(self, index, out):
            read.append(index)
            super().read(index, out)

    counted = Counted(**vars(train_split))
    for host in (0, 1):
        train_block(counted, 12, 0, 0, shard_of(host, 2), repeats=4)
    assert len(read) == 2 * 3


def test_one_repeat_and_uniform_sampling_change_nothing(train_split):
    assert same(take(train_split, 8, sampling="uniform", repeats=1), take(train_split, 8))


@pytest.mark.parametrize("hosts", [1, 2])
def test_skipping_takes_another_photograph_and_says_which_is_left_out(prepared, tmp_path, hosts):
    shutil.copytree(prepared, tmp_path / "copied")
    split, options = uneven(tmp_path / "copied"), dict(sampling="balanced", repeats=3)
    whole = take(split, 25, **options)
    rows = split.rows[[0, 24]]
    for index in (0, 24):
        (tmp_path / "copied" / "cleaned_images" / split.path(index)).unlink()
    without = take(split, 25, hosts, skip=True, **options)
    for before, after in zip(whole, without, strict=True):
        left_out = np.isin(before["row"], rows)
        assert np.array_equal(after["unread"], np.where(left_out, before["row"], -1))
        assert np.array_equal(after["row"][~left_out], before["row"][~left_out])
        assert not np.isin(after["row"], rows).any() and (after["row"].reshape(3, 4) == after["row"][:4]).all()


def test_a_batch_that_its_repeats_do_not_divide_is_refused_at_once(train_split):
    check_repeats(12, 4)
    message = "config.data.repeats is 5, which does not divide config.batch_size = 12: change one"
    with pytest.raises(ConfigError, match=message):
        check_repeats(12, 5)
    with pytest.raises(ConfigError, match=message):
        train_batches(train_split, 12, 0, 0, 0, shard_of(0, 1), repeats=5)
