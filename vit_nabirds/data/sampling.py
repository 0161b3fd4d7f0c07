"""Which photographs an epoch draws, and in which order: a pure function of the seed and the epoch."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np


def epoch_order(seed: int, epoch: int, labels: np.ndarray, sampling: str = "uniform") -> np.ndarray:
    """Indices of photographs, int (n,): the draws of an epoch in order. Their labels are int32 (n,).

    An epoch has as many draws as there are photographs. "uniform" draws each once. "balanced" draws each class equally
    often, "sqrt" as the square root of its number of photographs (Mahajan et al., 2018): over any number of epochs from
    the first on, to the draw. All photographs of a class are drawn before one comes again.
    """
    if sampling == "uniform":
        return _permutation(seed, epoch, len(labels))
    return _sampled_order(seed, epoch, labels.astype(np.int32).tobytes(), sampling)


@functools.lru_cache(4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    # Grain's own shuffle takes 30 us per index, longer than reading an image from a pack. RandomState's stream is
    # frozen (NumPy's NEP 19), so that a run can resume with another NumPy.
    return np.random.RandomState([seed, epoch]).permutation(length)


@functools.lru_cache(4)
def _sampled_order(seed: int, epoch: int, labels: bytes, sampling: str) -> np.ndarray:
    labels = np.frombuffer(labels, np.int32)
    classes, counts = np.unique(labels, return_counts=True)
    starts, stops = (draws_before(e, counts.tolist(), sampling) for e in (epoch, epoch + 1))
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    stream = np.random.RandomState(0)  # to seed one again takes a tenth of the time of a new one
    draws = [
        _draws_of_class(stream, [seed, int(label)], own, start, stop)
        for label, own, start, stop in zip(classes, members, starts, stops, strict=True)
    ]
    drawn = np.repeat(np.arange(len(draws)), [len(own) for own in draws])[_permutation(seed, epoch, len(labels))]
    order = np.empty(len(labels), np.int64)
    order[np.argsort(drawn, kind="stable")] = np.concatenate(draws)  # each class's draws stay in their order
    return order


def draws_before(epoch: int, counts: Sequence[int], sampling: str) -> list[int]:
    """How often each class, of so many photographs, 1 or more, is drawn in all epochs before this one.

    The classes divide the draws like slices of a line whose ends are rounded down, so that each is within one draw of
    its share, and together they are all draws. Whole numbers, because rounding must not differ between machines.
    """
    shares = [math.isqrt(10**6 * count) if sampling == "sqrt" else 1 for count in counts]
    ends = [epoch * sum(counts) * end // sum(shares) for end in itertools.accumulate(shares, initial=0)]
    return [stop - start for start, stop in itertools.pairwise(ends)]


def _draws_of_class(
    stream: np.random.RandomState, key: list[int], members: np.ndarray, start: int, stop: int
) -> np.ndarray:
    """The draws from `start` to `stop` of a class's endless sequence: one permutation of its members after another."""
    rounds, drawn = range(start // len(members), -(-stop // len(members))), [members[:0]]
    for number in rounds:
        stream.seed([*key, number])
        drawn.append(stream.permutation(members))
    first = rounds.start * len(members)
    return np.concatenate(drawn)[start - first : stop - first]
