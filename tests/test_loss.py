"""Losses against formulas written out: what is smoothed, what a class weighs, what is there in a mixed image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_nabirds.config.fields import Loss
from vit_nabirds.recipe.loss import balanced_weights, cross_entropy, make_loss

COUNTS = np.array([6, 3, 1])  # photographs of each class, mean weight 1: 10 / (3 * count)
WEIGHTS = np.array([5 / 9, 10 / 9, 10 / 3])
LOGITS = np.float32([[2.0, 0.0, -1.0], [0.5, -3.0, 1.0], [-0.25, 0.75, 8.0], [0.0, 0.0, 0.0]])
LABELS = np.int32([0, 2, 1, 2])
MIXED = np.float32([[0.75, 0, 0.25], [0, 0, 1], [0, 0.5, 0.5], [0.125, 0, 0.875]])
ALL = [
    Loss(name=name, label_smoothing=smoothing, class_weights=weights)
    for name in ("cross_entropy", "binary")
    for smoothing in (0.0, 0.1)
    for weights in ("none", "balanced")
]


def softmax_losses(logits, targets):
    logits = logits.astype(np.float64)
    return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1)


def sigmoid_losses(logits, targets):
    there = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return -(targets * np.log(there) + (1 - targets) * np.log(1 - there)).mean(-1)


def value(settings, logits=LOGITS, targets=LABELS):
    return float(make_loss(settings, COUNTS)(jnp.asarray(logits), jnp.asarray(targets))[0])


def test_the_default_is_the_plain_cross_entropy_itself():
    assert make_loss(Loss(), COUNTS) is cross_entropy
    assert value(Loss()) == pytest.approx(softmax_losses(LOGITS, np.eye(3)[LABELS]).mean(), rel=1e-6)


def test_a_mixed_image_costs_the_shares_of_what_each_of_its_classes_costs():
    """Zhang et al. (2018): lambda times the loss with one label and 1 - lambda times that with the other."""
    for settings in (Loss(), Loss(label_smoothing=0.1)):
        first, second = (value(settings, LOGITS[:1], np.int32([label])) for label in (0, 2))
        assert value(settings, LOGITS[:1], MIXED[:1]) == pytest.approx(0.75 * first + 0.25 * second, rel=1e-6)


@pytest.mark.parametrize("targets, shares", [(LABELS, np.eye(3)[LABELS]), (MIXED, MIXED)])
def test_smoothing_spreads_a_share_of_each_label_over_all_classes(targets, shares):
    expected = softmax_losses(LOGITS, 0.9 * shares + 0.1 / 3).mean()
    assert value(Loss(label_smoothing=0.1), targets=targets) == pytest.approx(expected, rel=1e-6)


def test_smoothing_is_satisfied_by_a_probability_below_one():
    """The best logits give the label 1 - 0.3 + 0.3 / 3 = 0.8 and the others 0.1: there the gradient is 0."""
    best = jnp.log(jnp.array([[0.8, 0.1, 0.1]]))
    loss = make_loss(Loss(label_smoothing=0.3), COUNTS)
    assert np.abs(jax.grad(lambda x: loss(x, jnp.array([0]))[0])(best)).max() < 1e-6


def test_binary_asks_each_class_by_itself():
    # No logit decides: a coin for each class. Then by hand: softplus(-2), softplus(0), softplus(-1).
    assert value(Loss(name="binary"), LOGITS[3:], LABELS[3:]) == pytest.approx(np.log(2), rel=1e-6)
    assert value(Loss(name="binary"), LOGITS[:1], LABELS[:1]) == pytest.approx(
        (0.12692801 + 0.69314718 + 0.31326169) / 3, rel=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets, there", [(LABELS, np.eye(3)[LABELS]), (MIXED, np.ceil(MIXED))])
def test_in_a_mixed_image_both_classes_are_there(targets, there, smoothing):
    """As in DeiT III, whatever their shares; smoothed as timm does, 1 - s + s / classes and s / classes."""
    expected = sigmoid_losses(LOGITS, (1 - smoothing) * there + smoothing / 3).mean()
    settings = Loss(name="binary", label_smoothing=smoothing)
    assert value(settings, targets=targets) == pytest.approx(expected, rel=1e-5)


def test_a_share_that_is_rounding_is_no_class():
    nearly = np.float32([[1 - 6e-8, 6e-8, 0]])
    assert value(Loss(name="binary"), LOGITS[1:2], nearly) == value(Loss(name="binary"), LOGITS[1:2], np.int32([0]))


def test_weights_are_balanced_and_one_on_average():
    weights = balanced_weights(COUNTS)
    np.testing.assert_allclose(weights, WEIGHTS, rtol=1e-6)
    assert (weights * COUNTS).sum() / COUNTS.sum() == pytest.approx(1)
    absent = balanced_weights(np.array([6, 0, 3, 1]))
    np.testing.assert_allclose(absent, [*WEIGHTS[:1], 0, *WEIGHTS[1:]], rtol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "binary"])
def test_balanced_over_all_photographs_each_class_counts_the_same(name):
    """The loss is the mean over the classes of the mean over their photographs."""
    labels = np.repeat([0, 1, 2], COUNTS).astype(np.int32)
    logits = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    each = [value(Loss(name=name), logits[labels == label], labels[labels == label]) for label in range(3)]
    assert value(Loss(name=name, class_weights="balanced"), logits, labels) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("losses", [softmax_losses, sigmoid_losses])
def test_a_mixed_image_weighs_what_its_classes_weigh_by_their_shares(losses):
    name = {softmax_losses: "cross_entropy", sigmoid_losses: "binary"}[losses]
    there = np.ceil(MIXED) if name == "binary" else MIXED
    expected = (losses(LOGITS, 0.9 * there + 0.1 / 3) * (MIXED @ WEIGHTS)).mean()
    settings = Loss(name=name, label_smoothing=0.1, class_weights="balanced")
    assert value(settings, targets=MIXED) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_labels_and_whole_shares_of_them_are_the_same(settings):
    for targets in (LABELS, np.eye(3, dtype=np.float32)[LABELS]):
        loss, metrics = jax.jit(make_loss(settings, COUNTS))(LOGITS, targets)
        assert loss == pytest.approx(value(settings), rel=1e-6) and loss.dtype == jnp.float32
        assert metrics["train/accuracy"] == 0.5  # the first two


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_the_mean_of_the_halves_is_that_of_the_batch(settings, targets):
    """Gradients too: so a batch can be worked on in parts, and on many devices."""
    function = jax.value_and_grad(lambda logits, targets: make_loss(settings, COUNTS)(logits, targets)[0])
    loss, gradient = function(LOGITS, targets)
    halves = [function(LOGITS[part], targets[part]) for part in (slice(0, 2), slice(2, 4))]
    assert loss == pytest.approx(np.mean([half[0] for half in halves]), rel=1e-6)
    np.testing.assert_allclose(gradient, np.concatenate([half[1] for half in halves]) / 2, rtol=1e-5)


def test_large_logits_have_finite_losses_and_gradients():
    for settings in ALL:
        loss = make_loss(settings, COUNTS)
        found = jax.value_and_grad(lambda x, loss=loss: loss(x, jnp.array([1]))[0])(jnp.array([[1e4, -1e4, 0.0]]))
        assert all(np.isfinite(x).all() for x in found)


def test_a_mixed_image_is_right_if_its_larger_part_is_recognised():
    for settings in (Loss(), Loss(name="binary")):
        metrics = make_loss(settings, COUNTS)(jnp.asarray(LOGITS[:2]), jnp.float32([[0.75, 0.25, 0], [0.75, 0, 0.25]]))[
            1
        ]
        assert metrics["train/accuracy"] == 0.5
