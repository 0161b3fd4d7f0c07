"""Moving averages of parameters, and parameters between two sets of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_nabirds.recipe.averages import ema, interpolate


def averaged(values, decay):
    """The average after each step, of one parameter that is 0 before the first and then has these values."""
    average, after = {"a": jnp.zeros(1)}, []
    for step, value in enumerate(values):
        average = ema(average, {"a": jnp.full(1, value), "frozen": jnp.ones(1)}, decay, jnp.int32(step))
        after.append(average)
    return after


def test_average_warms_up_as_the_decay_of_tensorflow_does():
    first, second = averaged([5.0, 1.0], decay=0.999)
    assert first["a"] == pytest.approx(0.9 * 5)  # decays 1/10 and 2/11
    assert second["a"] == pytest.approx(2 / 11 * 4.5 + 9 / 11 * 1)


def test_average_is_the_weighted_mean_of_all_values():
    values, decay, expected = np.random.RandomState(0).randn(300), 0.9, 0.0
    for step, value in enumerate(values):
        rate = min(decay, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * value
    assert averaged(values, decay)[-1]["a"] == pytest.approx(expected, abs=1e-6)
    recent = values[-100:] @ (0.1 * 0.9 ** np.arange(99, -1, -1))  # by then the decay is 0.9, and older ones count 3e-5
    assert averaged(values, decay)[-1]["a"] == pytest.approx(recent, abs=1e-3)


def test_average_has_its_own_paths_in_float32_and_keeps_a_constant():
    average = ema({"a": jnp.full(3, 0.3)}, {"a": jnp.full(3, 0.3), "frozen": jnp.ones(1)}, 0.9999, jnp.int32(7))
    assert list(average) == ["a"] and average["a"].dtype == jnp.float32
    np.testing.assert_array_equal(average["a"], np.full(3, 0.3, np.float32))


def test_a_decay_close_to_one_is_not_rounded():
    rate = 1e-6  # 1 - 0.999999 is 1.013e-6 in float32
    average = ema({"a": jnp.zeros(1)}, {"a": jnp.ones(1)}, 1 - rate, jnp.int32(1_000_000_000))
    assert average["a"] == pytest.approx(rate, rel=1e-6)


PRETRAINED = {"cls_token": np.float32([1, 2, 0.1]), "classifier/kernel": np.float32([7])}
TUNED = {"cls_token": np.float32([3, 0, 0.7]), "classifier/kernel": np.float32([9]), "registers": np.float32([5])}


def test_interpolation_is_a_point_on_the_line_between_both():
    between = interpolate(PRETRAINED, TUNED, 0.25)
    np.testing.assert_allclose(between["cls_token"], [1.5, 1.5, 0.25], rtol=1e-6)
    assert between["cls_token"].dtype == np.float32 and list(between) == list(TUNED)


def test_interpolation_ends_at_both_exactly():
    for share, end in ((0.0, PRETRAINED), (1.0, TUNED)):
        np.testing.assert_array_equal(interpolate(PRETRAINED, TUNED, share)["cls_token"], end["cls_token"])


def test_classifier_and_what_is_new_are_the_tuned_ones():
    between = interpolate(PRETRAINED, TUNED, 0.25)
    assert between["classifier/kernel"] == 9 and between["registers"] == 5
